//! How do checked bytes become code? dlopen, one symbol, one table; never unloaded.

use crate::call::checked;
use crate::discover::Found;
use crate::host::Host;
use crate::library::Library;
use crate::{BackendError, Manifest, taint};
use libloading::os::unix::{Library as Mapped, RTLD_LOCAL, RTLD_NOW};
use sparsed_abi::{
    ABI_MAJOR, ABI_MINOR, ABI_MINOR_FIRST, ENTRY_SYMBOL, LAYOUT_DIGEST, SpdApi, SpdGetApiFn, SpdInstance,
};
use std::collections::BTreeMap;
use std::ffi::CStr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

/// Length of the first minor's table: `spd_api` up to and including `extension`.
const TABLE_BYTES_MIN: usize = std::mem::offset_of!(SpdApi, extension) + size_of::<usize>();
/// A longer table is nonsense.
const TABLE_BYTES_MAX: usize = 1 << 16;

/// A loaded plugin with its instance. Its code stays mapped until the process ends, so the table is `'static`.
#[derive(Debug)]
pub struct Plugin {
    manifest: Manifest,
    path: PathBuf,
    sha256: String,
    api: &'static SpdApi,
    /// Of the plugin's own table, wherever it is.
    abi_minor: u32,
    instance: NonNull<SpdInstance>,
    /// Guards every `[control]` function of this instance: the header allows one thread at a time.
    control: Mutex<()>,
    /// Must outlive the instance; fields drop after `Drop::drop`. None for a plugin in a process of its own.
    _host: Option<Host>,
    /// The process, if it is not this one.
    host_process: Option<u32>,
}

// SAFETY: the instance is used through `[control]` functions under `control`, and through `[any]` functions.
unsafe impl Send for Plugin {}
// SAFETY: as above.
unsafe impl Sync for Plugin {}

impl Plugin {
    /// Loads the library that the manifest has for this machine, after its owner, mode, sha256 and ELF headers have
    /// been checked, and creates the plugin's instance with these settings.
    ///
    /// # Errors
    /// Which file, and why it was refused.
    pub fn load(found: &Found, settings: &BTreeMap<String, String>) -> Result<Arc<Self>, BackendError> {
        // Before its initialisers run, whatever comes of it then.
        taint::note(found);
        Self::load_here(found, settings)
    }

    /// As [`Self::load`], for a host process: whose plugin it is has been noted by the daemon.
    pub(crate) fn load_here(found: &Found, settings: &BTreeMap<String, String>) -> Result<Arc<Self>, BackendError> {
        let manifest = found.manifest.clone();
        let section = found.variant()?;
        let library = found.open_library(section)?;
        let path = library.path.clone();
        let sha256 = section.sha256.clone();
        let api = table_of(&sha256, library)?;
        check_identity(&path, api, &manifest)?;
        let host = Host::new(&manifest.id, settings);
        let mut instance = ptr::null_mut();
        let create = api.instance_create.expect("checked by table()");
        // SAFETY: the host table lives as long as the instance; the out pointer and the error are ours.
        checked("instance_create", |error| unsafe { create(host.as_ptr(), &raw mut instance, error) })?;
        let bad = || BackendError::BadTable { path: path.clone(), reason: "instance_create answered NULL".to_owned() };
        let instance = NonNull::new(instance).ok_or_else(bad)?;
        log::info!(plugin = manifest.id.as_str(), version = manifest.version.as_str(), path:% = path.display(); "plugin loaded");
        let (control, host, abi_minor) = (Mutex::new(()), Some(host), api.abi_minor);
        Ok(Arc::new(Self {
            manifest,
            path,
            sha256,
            api,
            abi_minor,
            instance,
            control,
            _host: host,
            host_process: None,
        }))
    }

    /// A plugin whose instance stands for the process `host`, with the ABI's minor that its own table is of.
    pub(crate) fn of_host(
        manifest: Manifest,
        path: PathBuf,
        sha256: String,
        api: &'static SpdApi,
        instance: NonNull<SpdInstance>,
        (host, abi_minor): (u32, u32),
    ) -> Arc<Self> {
        let (control, host_process) = (Mutex::new(()), Some(host));
        Arc::new(Self { manifest, path, sha256, api, abi_minor, instance, control, _host: None, host_process })
    }

    /// The id of the process that the plugin runs in, if it is not this one.
    pub fn host_process(&self) -> Option<u32> {
        self.host_process
    }

    /// What the plugin says about itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The ABI that its table is of: major and minor.
    pub fn abi(&self) -> (u32, u32) {
        (ABI_MAJOR, self.abi_minor)
    }

    /// The library file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Of the library, in lower-case hexadecimal; what quarantines go by.
    pub fn sha256(&self) -> &str {
        &self.sha256
    }

    /// How many devices the plugin sees.
    ///
    /// # Errors
    /// The plugin's own.
    pub fn device_count(&self) -> Result<u32, BackendError> {
        let (_guard, mut count) = (self.control(), 0);
        let call = self.api.device_count.expect("checked by table()");
        // SAFETY: the instance is alive; the out pointer and the error are ours.
        checked("device_count", |error| unsafe { call(self.instance.as_ptr(), &raw mut count, error) })?;
        Ok(count)
    }

    pub(crate) fn api(&self) -> &'static SpdApi {
        self.api
    }

    pub(crate) fn instance(&self) -> *mut SpdInstance {
        self.instance.as_ptr()
    }

    /// Held during every `[control]` call. A panic elsewhere while it was held leaves nothing half-done here.
    pub(crate) fn control(&self) -> MutexGuard<'_, ()> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`Self::control`]; `None` while such a call is under way.
    pub(crate) fn try_control(&self) -> Option<MutexGuard<'_, ()>> {
        match self.control.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(panicked)) => Some(panicked.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

impl Drop for Plugin {
    fn drop(&mut self) {
        let destroy = self.api.instance_destroy.expect("checked by table()");
        // SAFETY: devices hold an Arc of the plugin, so none is left.
        unsafe { destroy(self.instance.as_ptr()) };
    }
}

/// The table of a library; the same bytes are mapped once in a process, however often they are loaded.
fn table_of(sha256: &str, library: Library) -> Result<&'static SpdApi, BackendError> {
    static TABLES: Mutex<BTreeMap<String, Table>> = Mutex::new(BTreeMap::new());
    let mut tables = TABLES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(Table(api)) = tables.get(sha256) {
        return Ok(api);
    }
    let (path, entry) = entry_of(library)?;
    let api = table(&path, entry)?;
    tables.insert(sha256.to_owned(), Table(api));
    Ok(api)
}

struct Table(&'static SpdApi);

// SAFETY: a plugin's table is static and never written; its functions say by their tags who may call them.
unsafe impl Send for Table {}

/// Loads the library that the manifest has for this machine, checked as [`Plugin::load`] does, and finds its one
/// symbol. Asks it nothing.
///
/// # Errors
/// Which file, and why it was refused.
pub fn entry_point(found: &Found) -> Result<SpdGetApiFn, BackendError> {
    Ok(entry_of(found.open_library(found.variant()?)?)?.1)
}

fn entry_of(library: Library) -> Result<(PathBuf, SpdGetApiFn), BackendError> {
    let path = library.path.clone();
    let mapped = open_library(&path, library.seal()?)?;
    // SAFETY: the symbol, if it is there, has this type: that is what its name means.
    let entry = unsafe { mapped.get::<SpdGetApiFn>(ENTRY_SYMBOL) };
    let entry = *entry.map_err(|_| BackendError::MissingSymbol { path: path.clone() })?;
    // Never closed: code and table live until the process ends.
    std::mem::forget(mapped);
    Ok((path, entry))
}

/// Opens the sealed bytes through their descriptor, which is kept open for ever: the linker knows the library by its
/// number, which must not come to mean another file.
fn open_library(path: &Path, sealed: OwnedFd) -> Result<Mapped, BackendError> {
    let name = format!("/proc/self/fd/{}", sealed.as_raw_fd());
    std::mem::forget(sealed);
    // SAFETY: loading runs the library's initialisers. Owner, mode, sha256 and ELF headers of its file were checked.
    let opened = unsafe { Mapped::open(Some(&name), RTLD_NOW | RTLD_LOCAL) };
    opened.map_err(|error| {
        let reason = std::error::Error::source(&error).map_or_else(|| error.to_string(), ToString::to_string);
        BackendError::Load { path: path.to_owned(), reason: reason.replace(&name, &path.display().to_string()) }
    })
}

/// Asks the library for its table and checks that it is whole.
fn table(path: &Path, entry: SpdGetApiFn) -> Result<&'static SpdApi, BackendError> {
    let version = |found: String| BackendError::AbiVersion { path: path.to_owned(), found };
    // SAFETY: the library stays loaded; the function touches nothing and answers NULL or a static table.
    let api = unsafe { entry(ABI_MAJOR, ABI_MINOR) };
    // SAFETY: a non-NULL answer is a static table that begins with struct_size and abi_minor in every version.
    let head = unsafe { api.cast::<[u32; 2]>().as_ref() };
    let &[struct_size, minor] = head.ok_or_else(|| version(format!("not {ABI_MAJOR}.x")))?;
    let struct_size = struct_size as usize;
    if minor < ABI_MINOR_FIRST || !(TABLE_BYTES_MIN..=TABLE_BYTES_MAX).contains(&struct_size) {
        return Err(version(format!("{ABI_MAJOR}.{minor} (table of {struct_size} bytes)")));
    }
    let mut known = SpdApi::default();
    // SAFETY: the plugin's table has struct_size bytes and lives for ever; ours has at least as many as are copied.
    // What an older plugin does not have stays NULL.
    unsafe {
        let length = struct_size.min(size_of::<SpdApi>());
        ptr::copy_nonoverlapping(api.cast::<u8>(), (&raw mut known).cast::<u8>(), length);
    }
    if known.layout != LAYOUT_DIGEST {
        let reason = format!(
            "its header was changed otherwise than by appending (SPD_LAYOUT {:#018x}, this daemon has \
             {LAYOUT_DIGEST:#018x})",
            known.layout
        );
        return Err(BackendError::BadTable { path: path.to_owned(), reason });
    }
    let api: &'static SpdApi = Box::leak(Box::new(known)); // as long as the code, which is never unloaded
    let missing = missing_function(api);
    match missing {
        None => Ok(api),
        Some(name) => Err(BackendError::BadTable {
            path: path.to_owned(),
            reason: format!("its table lacks the mandatory function {name}"),
        }),
    }
}

fn missing_function(api: &SpdApi) -> Option<&'static str> {
    macro_rules! first_missing {
        ($($name:ident),* $(,)?) => { $(if api.$name.is_none() { return Some(stringify!($name)); })* };
    }
    first_missing!(
        instance_create,
        instance_destroy,
        device_count,
        device_info,
        device_open,
        device_close,
        self_test,
        mem_info,
        health,
        supports,
        host_alloc,
        host_free,
        host_register,
        host_unregister,
        weight_create,
        weight_upload,
        weight_commit,
        weight_destroy,
        kv_create,
        kv_destroy,
        plan_compile,
        plan_destroy,
        queue_create,
        queue_destroy,
        queue_run,
        queue_kv,
        queue_wait_queue,
        queue_query,
        queue_wait,
        queue_cancel,
        extension,
    );
    None
}

fn check_identity(path: &Path, api: &SpdApi, manifest: &Manifest) -> Result<(), BackendError> {
    let refuse = |reason: String| Err(BackendError::BadTable { path: path.to_owned(), reason });
    if api.plugin_id.is_null() || api.plugin_version.is_null() {
        return refuse("its table has no id or no version".to_owned());
    }
    // SAFETY: not NULL, and the header says static NUL-terminated strings.
    let id = unsafe { CStr::from_ptr(api.plugin_id) }.to_string_lossy();
    // SAFETY: as above.
    let version = unsafe { CStr::from_ptr(api.plugin_version) }.to_string_lossy();
    if id != manifest.id || version != manifest.version {
        let said = format!("{} {}", manifest.id, manifest.version);
        return refuse(format!("the library is {id} {version}, plugin.toml says {said}"));
    }
    if api.required_host_features != 0 {
        return refuse(format!("needs host features {:#x}, this daemon has none", api.required_host_features));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use crate::fixture::Fixture;
    use crate::taint::third_party;
    use crate::{Plugin, SearchPath};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    #[test]
    fn a_plugin_is_loaded_from_the_bytes_that_were_checked() {
        let fixture = Fixture::build(&[]);
        let plugin = fixture.load().unwrap();
        std::fs::write(fixture.file(), "").unwrap();
        assert_eq!(plugin.device_count().unwrap(), 0);
        assert_eq!(plugin.path(), fixture.file());
        assert_eq!(plugin.sha256(), plugin.manifest().libraries[0].sha256);
    }

    #[test]
    fn the_same_bytes_are_mapped_once() {
        let fixture = Fixture::build(&["-DMAPPED_ONCE"]);
        let (first, second) = (fixture.load().unwrap(), fixture.load().unwrap());
        assert!(std::ptr::eq(first.api(), second.api()) && !Arc::ptr_eq(&first, &second));
        let other = Fixture::build(&["-DMAPPED_ONCE", "-O2", "-g"]).load().unwrap();
        assert!(!std::ptr::eq(first.api(), other.api()));
    }

    #[test]
    fn a_library_that_contradicts_its_manifest_is_refused() {
        let said = Fixture::build(&["-DVERSION=\"9.9\""]).load().unwrap_err().to_string();
        assert!(said.contains("the library is fixture 9.9, plugin.toml says fixture 1.2.3"), "{said}");
    }

    #[test]
    fn a_third_party_plugin_taints_and_one_of_ours_does_not() {
        let theirs = Fixture::build(&["-DVERSION=\"7.7\""]);
        theirs.write_manifest("7.7", "");
        assert!(!third_party().contains(&"fixture 7.7".to_owned()));
        let (_first, _second) = (theirs.load().unwrap(), theirs.load().unwrap());
        assert_eq!(third_party().iter().filter(|name| *name == "fixture 7.7").count(), 1);
        // Ours by id and version; the same id in another version is not.
        let ours = format!("-DVERSION=\"{}\"", env!("CARGO_PKG_VERSION"));
        for (version, taints) in [(env!("CARGO_PKG_VERSION"), false), ("0.0.1", true)] {
            let fixture = Fixture::empty("cuda");
            let version_argument = if taints { "-DVERSION=\"0.0.1\"" } else { ours.as_str() };
            fixture.compile(&["-DID=\"cuda\"", version_argument]);
            fixture.write_manifest(version, "");
            let scan = SearchPath::installed(fixture.root().to_owned()).scan();
            let _plugin = Plugin::load(scan.select(None).unwrap(), &BTreeMap::new()).unwrap();
            assert_eq!(third_party().contains(&format!("cuda {version}")), taints);
        }
    }
}
