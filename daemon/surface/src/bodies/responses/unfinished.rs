//! Which answers go on by themselves once models are loaded? Those of responses in the background that the daemon's end
//! has cut: whoever asked for them does not hold a connection and may never ask again.
//!
//! A few at a time, the one that was used first at the beginning, behind all else that their owners ask for. A client
//! that asks for one meanwhile hears the same run, or begins it earlier.

use super::runs::{Found, Run, Runs};
use super::stored::ResponseId;
use crate::bodies::sessions;
use crate::refusal::Refusal;
use futures_util::{StreamExt, stream};
use sparsed_engine::api::Owner;
use sparsed_engine::{ModelState, Service, SessionId};
use std::sync::Arc;
use std::time::Duration;

/// Behind all other requests of the same owner.
const PRIORITY: i32 = 1000;
/// Pause between looks at models that are being loaded.
const LOOK: Duration = Duration::from_millis(250);
/// Pause before an answer is begun again.
const AGAIN: Duration = Duration::from_secs(10);

/// Finishes what there is to finish, so many at a time; with 0 or without sessions there is nothing.
pub(crate) async fn finish_all(service: &Service, runs: &Runs, at_a_time: usize) {
    if at_a_time == 0 {
        return;
    }
    while service.models().iter().any(|model| matches!(model.state, ModelState::Loading { .. })) {
        tokio::time::sleep(LOOK).await;
    }
    let cut = loop {
        match sessions::verb(service, None, |service| service.sessions()?.interrupted()).await {
            Ok(cut) => break cut,
            // Their disk comes late.
            Err(refusal) => match refusal.retry_after_s() {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds.into())).await,
                None => return,
            },
        }
    };
    let finish = |(owner, session)| async move {
        if let Err(refusal) = finish_one(service, runs, owner, session).await {
            log::warn!(session:%, reason = refusal.message(); "answer does not go on by itself, only when it is asked for");
        }
    };
    stream::iter(cut).for_each_concurrent(at_a_time, finish).await;
}

/// Waits until the answer is whole, if it is one in the background. One that there was no time for is begun again; the
/// session counts how often.
async fn finish_one(service: &Service, runs: &Runs, owner: Owner, session: SessionId) -> Result<(), Refusal> {
    loop {
        let turn =
            sessions::verb(service, Some(owner), move |service| service.sessions()?.goes_on_alone(owner, session))
                .await?;
        let Some(turn) = turn else { return Ok(()) };
        let Some(run) = begun(service, runs, owner, ResponseId { session, turn }).await? else { return Ok(()) };
        log::info!(session:%; "answer that was cut goes on by itself");
        run.end().await;
        if !run.has_failed() {
            return Ok(());
        }
        tokio::time::sleep(AGAIN).await;
    }
}

/// The answer under way, when there is room for it; `None` if it is whole.
async fn begun(service: &Service, runs: &Runs, owner: Owner, id: ResponseId) -> Result<Option<Arc<Run>>, Refusal> {
    loop {
        match runs.find(service, owner, id, None, PRIORITY).await {
            Ok(Found::Run(run)) => return Ok(Some(run)),
            Ok(Found::Told(..)) => return Ok(None),
            // Others come first.
            Err(refusal) => match refusal.retry_after_s() {
                Some(seconds) => tokio::time::sleep(Duration::from_secs(seconds.into())).await,
                None => return Err(refusal),
            },
        }
    }
}
