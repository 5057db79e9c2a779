//! How does a run survive the plugin it tries? Rules are tried one after another, each in a process of its own.

use crate::child::{MARK, Said};
use crate::report::{Line, Report};
use crate::rule::{self, Check, Level, Rule};
use crate::verdict::Verdict;
use sparsed_backend::{Found, SearchPath};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

/// Most bytes kept of what a child writes to standard error.
const STDERR_BYTES_MAX: u64 = 64 << 10;

/// Rules that must hold for any rule after them to mean anything.
const GATES: [&str; 5] = ["manifest.valid", "manifest.accepted", "load.opens", "abi.layout", "abi.table_whole"];

/// Rules that may hang in a run. What hangs at one rule tends to hang at the next one too, and each costs its time.
const HANGS_MAX: usize = 2;

/// How a plugin is tried.
#[derive(Clone, Debug)]
pub struct Options {
    /// The plugin's folder, with `plugin.toml`.
    pub folder: PathBuf,
    /// The deepest level.
    pub level: Level,
    /// Where random numbers come from.
    pub seed: u64,
    /// How long one rule may take.
    pub deadline: Duration,
    /// A command that calls [`crate::child`] with the folder, the rule's id and the seed, which are appended to it.
    pub child: Vec<PathBuf>,
}

/// The plugin in `folder`, after the checks that the daemon makes before it loads one.
pub(crate) fn find(folder: &Path) -> Result<Found, String> {
    let folder = folder.canonicalize().map_err(|error| format!("{}: {error}", folder.display()))?;
    let parent = folder.parent().ok_or("a plugin's folder has a parent")?;
    let scan = SearchPath::only(vec![parent.to_owned()]).scan();
    if let Some(found) = scan.found.into_iter().find(|found| found.dir == folder) {
        return Ok(found);
    }
    let refused = scan.refused.into_iter().find(|refusal| refusal.dir == folder);
    Err(refused
        .map_or_else(|| format!("{}: has no plugin.toml", folder.display()), |refusal| refusal.error.to_string()))
}

/// Tries every rule up to the level; `each` sees a line as soon as it is there.
pub fn run(options: &Options, mut each: impl FnMut(usize, &Line)) -> Report {
    let found = find(&options.folder);
    let name = || options.folder.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let manifest = found.as_ref().ok().map(|found| &found.manifest);
    let mut report = Report {
        plugin: manifest.map_or_else(name, |manifest| manifest.id.clone()),
        version: manifest.map(|manifest| manifest.version.clone()),
        sha256: found.as_ref().ok().and_then(|found| Some(found.variant().ok()?.sha256.clone())),
        device: None,
        seed: options.seed,
        lines: Vec::new(),
    };
    let mut hung = Vec::new();
    for rule in rule::all().filter(|rule| rule.level <= options.level) {
        let verdict = match unmet(rule, &report) {
            Some(need) => Verdict::Skipped(format!("not tried, since {need} is not kept")),
            None if hung.len() >= HANGS_MAX && matches!(rule.check, Check::Code(_)) => {
                Verdict::Skipped(format!("not tried, since the plugin hangs at {}", hung.join(" and ")))
            }
            None => match judge(rule, &found, options) {
                Ok(said) => {
                    report.device = report.device.or(said.device);
                    said.verdict
                }
                Err(Silent::Ended(why)) => Verdict::Failed(why),
                Err(Silent::Hung) => {
                    hung.push(rule.id);
                    Verdict::Failed(format!("no answer within {} s", options.deadline.as_secs_f64()))
                }
            },
        };
        let line = Line { rule, verdict };
        report.lines.push(line);
        each(report.lines.len(), &report.lines[report.lines.len() - 1]);
    }
    report
}

/// The first rule that this one needs and that is not kept.
fn unmet(rule: &Rule, report: &Report) -> Option<&'static str> {
    let kept = |need: &str| report.lines.iter().any(|l| l.rule.id == need && l.verdict == Verdict::Ok);
    let gates = GATES.into_iter().filter(|gate| report.lines.iter().any(|line| line.rule.id == *gate));
    gates.chain(rule.needs.iter().copied()).find(|need| !kept(need))
}

/// Why a child says nothing.
enum Silent {
    Ended(String),
    Hung,
}

fn judge(rule: &Rule, found: &Result<Found, String>, options: &Options) -> Result<Said, Silent> {
    let verdict = |verdict| Ok(Said { verdict, device: None });
    match (rule.check, found) {
        (_, Err(why)) => verdict(Verdict::Failed(why.clone())),
        (Check::Files(check), Ok(found)) => verdict(check(found).into()),
        (Check::Code(_), Ok(_)) => isolated(rule, options),
    }
}

/// Tries the rule in a child process.
fn isolated(rule: &Rule, options: &Options) -> Result<Said, Silent> {
    let none = || Silent::Ended("no command for the child".to_owned());
    let (program, arguments) = options.child.split_first().ok_or_else(none)?;
    let mut command = Command::new(program);
    command.args(arguments).arg(&options.folder).arg(rule.id).arg(options.seed.to_string());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let failed = |what: &str, error| Silent::Ended(format!("{what}: {error}"));
    let mut child = command.spawn().map_err(|error| failed("cannot start a child process", error))?;
    let (said, stderr) = (listen(&mut child), complaints(&mut child));
    match said.recv_timeout(options.deadline) {
        Ok(said) => {
            // It may hang after its word: leaving is part of no rule.
            end(&mut child);
            Ok(said)
        }
        Err(RecvTimeoutError::Disconnected) => {
            let status = child.wait().map_err(|error| failed("how the child ended is not known", error))?;
            let last = stderr.recv_timeout(Duration::from_secs(1)).unwrap_or_default();
            Err(Silent::Ended(format!("the plugin ended the process: {}{}", ending(status), last_line(&last))))
        }
        Err(RecvTimeoutError::Timeout) => {
            end(&mut child);
            Err(Silent::Hung)
        }
    }
}

/// Ends a child that may have ended already.
fn end(child: &mut Child) {
    let _ended_already = child.kill();
    let _status = child.wait();
}

/// The child's word, once it says it; closed when it ends without one.
fn listen(child: &mut Child) -> Receiver<Said> {
    let (say, said) = channel();
    if let Some(out) = child.stdout.take() {
        std::thread::spawn(move || {
            for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line);
                let word = line.strip_prefix(MARK).and_then(|json| serde_json::from_str(json).ok());
                if word.is_some_and(|word| say.send(word).is_err()) {
                    return;
                }
            }
        });
    }
    said
}

/// The beginning of what the child writes to standard error, once it has ended.
fn complaints(child: &mut Child) -> Receiver<String> {
    let (say, said) = channel();
    if let Some(mut err) = child.stderr.take() {
        std::thread::spawn(move || {
            let mut kept = Vec::new();
            let _cut = err.by_ref().take(STDERR_BYTES_MAX).read_to_end(&mut kept);
            let _nobody_asks = say.send(String::from_utf8_lossy(&kept).into_owned());
            let _rest = std::io::copy(&mut err, &mut std::io::sink());
        });
    }
    said
}

fn ending(status: ExitStatus) -> String {
    match (status.signal(), status.code()) {
        (Some(11), _) => "SIGSEGV".to_owned(),
        (Some(6), _) => "SIGABRT".to_owned(),
        (Some(7), _) => "SIGBUS".to_owned(),
        (Some(8), _) => "SIGFPE".to_owned(),
        (Some(4), _) => "SIGILL".to_owned(),
        (Some(signal), _) => format!("signal {signal}"),
        (None, code) => format!("exit code {}", code.unwrap_or_default()),
    }
}

fn last_line(text: &str) -> String {
    text.lines().rev().find(|line| !line.trim().is_empty()).map_or_else(String::new, |line| format!(" ({line})"))
}
