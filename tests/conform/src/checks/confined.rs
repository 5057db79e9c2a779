//! L4: does the plugin keep to its process? The daemon loads it into one of its own and confines that.

use super::slow::read_while_confined;
use super::{adder, adds};
use crate::child::Context;
use crate::rule::{Level, Rule, rule};
use crate::step::Step;
use crate::verdict::{Outcome, Wrong, ensure, skip};
use sparsed_backend::confine;

pub(crate) const RULES: &[Rule] = &[
    rule(
        Level::L4,
        "life.processes",
        "no process is started",
        "VENDOR.md, the process your code runs in",
        &["op.add.golden"],
        processes,
    ),
    rule(
        Level::L4,
        "life.confined",
        "the device opens and computes in a process that is confined as the daemon confines it",
        "VENDOR.md, the process your code runs in",
        &["op.add.golden"],
        |context| confined(context, works),
    ),
    rule(
        Level::L4,
        "life.confined_slow",
        "the slow tier's file is read in a process that is confined so: there is no io_uring",
        "VENDOR.md, the process your code runs in",
        &["life.confined", "slow.file"],
        |context| confined(context, read_while_confined),
    ),
];

/// Opens the device, passes its test, and has a step computed.
fn works(context: &Context) -> Outcome {
    let (session, mut rng) = (context.session()?, context.random());
    let step = Step::without_pool(&[3]);
    let ready = adder(&session).compile(&[&step])?;
    adds(&ready, &mut rng, &step)
}

/// A process that is left behind comes to this one, and one that has ended waits to be taken.
fn processes(context: &Context) -> Outcome {
    let own = Some(rustix::process::getpid());
    match rustix::process::set_child_subreaper(own) {
        // Linux has it since 3.4; what emulates one may not.
        Err(rustix::io::Errno::INVAL) => return skip("this system adopts no processes"),
        adopted => adopted.map_err(|errno| Wrong::Failed(format!("cannot adopt processes: {errno}")))?,
    }
    works(context)?;
    let child = rustix::process::wait(rustix::process::WaitOptions::NOHANG);
    ensure!(child.is_err_and(|errno| errno == rustix::io::Errno::CHILD), "a process was started; its host may not");
    Ok(())
}

/// The library is mapped already, as the kit does it; its code runs for the first time here.
fn confined(context: &Context, check: fn(&Context) -> Outcome) -> Outcome {
    let found = &context.found;
    confine(&found.dir, &found.manifest).map_err(|error| Wrong::Failed(format!("cannot be confined: {error}")))?;
    check(context)
}
