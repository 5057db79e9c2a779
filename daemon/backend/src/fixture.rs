//! Plugin folders for tests: `fixtures/plugin.c` built with `cc`, one thing wrong at a time.

use crate::{BackendError, Found, Plugin, Scan, SearchPath};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

/// A search path's folder with one plugin in it.
pub(crate) struct Fixture {
    root: tempfile::TempDir,
    id: String,
}

impl Fixture {
    /// The plugin `fixture`, built with these arguments on top.
    pub(crate) fn build(arguments: &[&str]) -> Self {
        let fixture = Self::empty("fixture");
        fixture.compile(arguments);
        fixture.write_manifest("1.2.3", "");
        fixture
    }

    /// The folder of a plugin without anything in it.
    pub(crate) fn empty(id: &str) -> Self {
        let fixture = Self { root: tempfile::tempdir().unwrap(), id: id.to_owned() };
        std::fs::create_dir(fixture.dir()).unwrap();
        fixture.set_mode("", 0o755);
        std::fs::set_permissions(fixture.root(), Permissions::from_mode(0o755)).unwrap();
        fixture
    }

    /// Builds the library.
    pub(crate) fn compile(&self, arguments: &[&str]) {
        let crate_dir = Path::new(env!("CARGO_MANIFEST_DIR"));
        let mut cc = Command::new("cc");
        cc.args(["-std=gnu11", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-Wl,-z,nodelete,-z,now", "-I"]);
        cc.arg(crate_dir.join("../../abi/include")).arg(crate_dir.join("fixtures/plugin.c"));
        let built = cc.args(arguments).arg("-o").arg(self.file()).output().expect("cc runs");
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        self.set_mode("lib.so", 0o755);
    }

    /// Writes a manifest for the library as it is, with these lines in its section.
    pub(crate) fn write_manifest(&self, version: &str, library_lines: &str) {
        let bytes = std::fs::read(self.file()).unwrap_or_default();
        let sha256: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
        let (id, arch) = (&self.id, std::env::consts::ARCH);
        let text = format!(
            "manifest_version = 1\nid = \"{id}\"\nversion = \"{version}\"\nlicense = \"MIT\"\nvendor = \"Acme\"\n\
             [abi]\nmajor = [0]\narch = \"{arch}\"\n\
             [[library]]\npath = \"lib.so\"\nscore = 1\nsha256 = \"{sha256}\"\n{library_lines}\n"
        );
        std::fs::write(self.dir().join("plugin.toml"), text).unwrap();
        self.set_mode("plugin.toml", 0o644);
    }

    /// Changes bytes of the library and the manifest with it.
    pub(crate) fn patch(&self, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = std::fs::read(self.file()).unwrap();
        change(&mut bytes);
        std::fs::write(self.file(), bytes).unwrap();
        self.write_manifest("1.2.3", "");
    }

    pub(crate) fn root(&self) -> &Path {
        self.root.path()
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.root().join(&self.id)
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.dir().join("lib.so")
    }

    pub(crate) fn set_mode(&self, name: &str, mode: u32) {
        std::fs::set_permissions(self.dir().join(name), Permissions::from_mode(mode)).unwrap();
    }

    pub(crate) fn scan(&self) -> Scan {
        SearchPath::only(vec![self.root().to_owned()]).scan()
    }

    /// The plugin as a search finds it.
    pub(crate) fn found(&self) -> Found {
        self.scan().select(None).unwrap().clone()
    }

    pub(crate) fn load(&self) -> Result<Arc<Plugin>, BackendError> {
        Plugin::load(&self.found(), &BTreeMap::new())
    }

    /// Why it is not loaded; checking it without running any of it must say the same.
    pub(crate) fn refusal(&self) -> String {
        let said = self.load().expect_err("must be refused").to_string();
        assert_eq!(self.found().verify().expect_err("must be refused").to_string(), said);
        said
    }
}
