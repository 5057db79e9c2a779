//! The plugin of `probe.c`, built once, and what can be seen of its process from outside.

use sparsed_abi::{Blob, DIM_TOKENS, DT_F32, OP_ADD, OpSpec, ProgramBuilder, SpdBucket, StepArrays};
use sparsed_backend::{
    Backend, BackendError, Found, HostOptions, KvDesc, OpenOptions, Plan, Plugin, Queue, SearchPath,
};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks; no test depends on its length.
const PAUSE: Duration = Duration::from_millis(2);

/// Held for writing by a test that counts what the whole process has open, for reading by those that open something.
pub(crate) static ALONE: RwLock<()> = RwLock::new(());

/// Folder with the staged plugin.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let dir = tempfile::tempdir().unwrap();
    let (root, library) = (sparsed_tests::root(), dir.path().join("libprobe.so"));
    let version = format!("-DPROBE_VERSION=\"{}\"", env!("CARGO_PKG_VERSION"));
    let mut cc = Command::new("cc");
    cc.current_dir(root).args(["-std=gnu11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]);
    cc.args(["-fvisibility=hidden", "-Iabi/include", &version, "tests/host/probe.c", "-o"]).arg(&library);
    assert!(cc.status().unwrap().success());
    let manifest = std::fs::read_to_string(root.join("plugins/cpu/plugin.toml.in")).unwrap();
    let manifest = manifest.replace("\"cpu\"", "\"probe\"").replace("libsparsed_plugin_cpu.so", "libprobe.so");
    std::fs::write(dir.path().join("plugin.toml.in"), manifest).unwrap();
    let staged = dir.path().join("plugins");
    let mut stage = Command::new("sh");
    stage.current_dir(root).args(["packaging/stage-plugin.sh", "probe"]);
    assert!(stage.arg(library).arg(dir.path().join("plugin.toml.in")).arg(staged).status().unwrap().success());
    dir
});

/// A probe in a host of its own.
#[derive(Debug)]
pub(crate) struct Probe {
    pub(crate) backend: Backend,
    pub(crate) plugin: Arc<Plugin>,
    _turn: Option<RwLockReadGuard<'static, ()>>,
}

/// Hosts of the built daemon.
pub(crate) fn host_options() -> HostOptions {
    let program = sparsed_tests::root().join("target/release/sparsed");
    assert!(program.exists(), "{} is not there: run `make test`", program.display());
    HostOptions { program, ..HostOptions::default() }
}

impl Probe {
    pub(crate) fn open(settings: &[(&str, &str)]) -> Self {
        Self::open_with(settings, &host_options())
    }

    pub(crate) fn open_with(settings: &[(&str, &str)], options: &HostOptions) -> Self {
        Self::try_open(settings, options).unwrap()
    }

    pub(crate) fn try_open(settings: &[(&str, &str)], options: &HostOptions) -> Result<Self, BackendError> {
        let turn = ALONE.read().unwrap_or_else(PoisonError::into_inner);
        Ok(Self { _turn: Some(turn), ..start(settings, options)? })
    }

    /// For whoever holds [`ALONE`].
    pub(crate) fn open_alone(settings: &[(&str, &str)]) -> Self {
        start(settings, &host_options()).unwrap()
    }

    pub(crate) fn plan(&self) -> Result<Plan, BackendError> {
        let bucket = SpdBucket { max_tokens: 1, max_seqs: 1, max_logits: 1, max_context: 1 };
        self.backend.compile(&program(), &[], &[], bucket)
    }

    pub(crate) fn queue_and_plan(&self) -> (Queue, Plan) {
        (self.backend.queue().unwrap(), self.plan().unwrap())
    }

    /// Runs one step that answers as many bytes as it gets.
    pub(crate) fn run(&self, input: &[u8]) -> Result<(), BackendError> {
        let plan = self.plan()?;
        self.backend.queue()?.run(&plan, &step(), input, &mut vec![0; input.len()])
    }
}

/// The plugin before it is loaded.
pub(crate) fn found() -> Found {
    SearchPath::only(vec![FOLDER.path().join("plugins")]).scan().select(Some("probe")).unwrap().clone()
}

fn start(settings: &[(&str, &str)], options: &HostOptions) -> Result<Probe, BackendError> {
    LazyLock::force(&LOG);
    let settings = settings.iter().map(|&(key, value)| (key.to_owned(), value.to_owned())).collect();
    let plugin = Plugin::load_isolated(&found(), &settings, options)?;
    let backend = Backend::open(&plugin, 0, &OpenOptions::default())?;
    Ok(Probe { backend, plugin, _turn: None })
}

/// A program that is well-formed; the probe does not look at it.
pub(crate) fn program() -> Blob {
    let mut builder = ProgramBuilder::new();
    let x = builder.input(DT_F32, &[DIM_TOKENS, 1]);
    let y = builder.activation(DT_F32, &[DIM_TOKENS, 1]);
    builder.op(OpSpec { kind: OP_ADD, inputs: &[Some(x), Some(x)], outputs: &[Some(y)], ..OpSpec::default() });
    builder.mark_output(y);
    builder.finish(0)
}

/// A step without tokens.
pub(crate) fn step() -> Blob {
    StepArrays { seq_offsets: &[0], block_offsets: &[0], ..StepArrays::default() }.encode()
}

pub(crate) fn status_of_pool(backend: &Backend, desc: &KvDesc) -> Option<i32> {
    backend.create_kv(desc, None).err()?.status()
}

/// Sends a signal by its name.
pub(crate) fn signal(pid: u32, name: &str) {
    assert!(Command::new("kill").arg(format!("-{name}")).arg(pid.to_string()).status().unwrap().success());
}

/// Whether the process is there, as a zombie too.
pub(crate) fn exists(pid: u32) -> bool {
    PathBuf::from(format!("/proc/{pid}")).exists()
}

/// Whether one of its threads waits in pause(2) or what the C library makes of it.
pub(crate) fn blocked_in_pause(pid: u32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    threads.flatten().any(|thread| {
        let call = std::fs::read_to_string(thread.path().join("syscall")).unwrap_or_default();
        // x86-64: pause; aarch64: ppoll, which nobody else of the host calls without a timeout of an hour.
        let number = if cfg!(target_arch = "x86_64") { "34 " } else { "73 0x0 0x0 0x0" };
        call.starts_with(number)
    })
}

pub(crate) fn open_fds() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn rss_anon_bytes(pid: u32) -> u64 {
    status_bytes(pid, "RssAnon:")
}

pub(crate) fn rss_file_bytes(pid: u32) -> u64 {
    status_bytes(pid, "RssFile:")
}

fn status_bytes(pid: u32, key: &str) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(key)).unwrap();
    line.split_whitespace().next().unwrap().parse::<u64>().unwrap() * 1024
}

/// Asks again and again until `condition` holds.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "not after {PATIENCE:?}: {what}");
        std::thread::park_timeout(PAUSE);
    }
}

/// Lines of the log with the process they came from: `LEVEL plugin text`, and ` lines=N` where a record counts some.
static LOG: LazyLock<&'static Lines> = LazyLock::new(|| {
    let lines: &'static Lines = Box::leak(Box::default());
    log::set_logger(lines).unwrap();
    log::set_max_level(log::LevelFilter::Debug);
    lines
});

/// What was logged by or about host `pid`.
pub(crate) fn log_lines(pid: u32) -> Vec<String> {
    let all = LOG.0.lock().unwrap();
    all.iter().filter(|(host, _)| *host == pid).map(|(_, line)| line.clone()).collect()
}

#[derive(Debug, Default)]
struct Lines(Mutex<Vec<(u32, String)>>);

impl log::Log for Lines {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        let values = record.key_values();
        let host = values.get("host".into()).and_then(|host| host.to_u64()).unwrap_or(0);
        let plugin = values.get("plugin".into()).map(|plugin| plugin.to_string()).unwrap_or_default();
        let count = values.get("lines".into()).map(|lines| format!(" lines={lines}")).unwrap_or_default();
        let line = format!("{} {plugin} {}{count}", record.level(), record.args());
        self.0.lock().unwrap().push((u32::try_from(host).unwrap_or(0), line));
    }

    fn flush(&self) {}
}
