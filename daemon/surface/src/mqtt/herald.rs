//! What does everybody hear of this node? Its retained status and capabilities, what happens to it, and its numbers.

use super::desk::Input;
use super::link::{Delta, Deltas, Told};
use super::message::Address;
use super::options::MqttOptions;
use super::topics::{Op, Topics};
use crate::beat::{BEAT, Beat};
use serde_json::{Value, json};
use sparsed_engine::api::Reach;
use sparsed_engine::{DeviceState, ModelState, Service};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::{mpsc, watch};

/// How often models and device are looked at while a model is loaded, which is waited for; else with every beat.
const LOADING_LOOK: Duration = Duration::from_millis(250);
/// Looks between two telemetry messages.
const TELEMETRY_LOOKS: u64 = 2;

/// The payload of the status topic.
pub(super) fn status(state: &str, boot_id: &str) -> String {
    json!({ "v": 1, "state": state, "boot_id": boot_id, "ts": super::now_ms() / 1000 }).to_string()
}

/// Tells the desk what is new, until it has ended.
pub(super) async fn herald(
    service: Service,
    options: watch::Receiver<MqttOptions>,
    topics: Topics,
    deltas: Deltas,
    desk: mpsc::Sender<Told>,
) {
    let (mut said, mut states, mut sampled) = (String::new(), BTreeMap::new(), 0);
    let (beat, mut n_looks) = (Beat::every(1), 0_u64);
    loop {
        let is_loading = service.models().iter().any(|model| matches!(model.state, ModelState::Loading { .. }));
        let mut news = Vec::new();
        let info = info(&service, &options.borrow()).to_string();
        if said != info {
            said.clone_from(&info);
            news.push((topics.own("info"), info, true));
        }
        for (kind, name, payload) in events(&service, &mut states) {
            log::debug!(kind, name:%; "an event for MQTT");
            news.push((topics.own(&format!("event/{kind}")), payload.to_string(), false));
        }
        for (topic, payload, retain) in news {
            if desk.send(Told::Input(Input::News { topic, payload, retain })).await.is_err() {
                return;
            }
        }
        if !is_loading && n_looks % TELEMETRY_LOOKS == TELEMETRY_LOOKS - 1 {
            let payload = telemetry(&service, &mut sampled).to_string();
            let address = Address { topic: topics.own("telemetry"), correlation: None };
            // Where there is no room, the next one says more.
            let _told = deltas.tell(Delta { address, payload });
        }
        n_looks += u64::from(!is_loading);
        if is_loading {
            tokio::time::sleep(LOADING_LOOK).await;
        } else {
            beat.next().await;
        }
    }
}

fn info(service: &Service, options: &MqttOptions) -> Value {
    let model = |(name, state): (String, ModelState)| match state {
        ModelState::Ready(served) => Some(json!({
            "id": name, "name": served.model.name(), "max_context": served.max_context,
            "stateless_context": served.stateless_context,
            "chat": served.model.chat_format().is_some(), "label": served.model.label(),
        })),
        ModelState::Unloaded => Some(json!({ "id": name, "loaded": false })),
        ModelState::Elsewhere(upstream) if upstream.is_up() => Some(json!({
            "id": name, "name": upstream.model, "max_context": upstream.max_context, "chat": true,
            "label": format!("computed elsewhere, by {}", upstream.address), "upstream": true,
        })),
        ModelState::Elsewhere(_) | ModelState::Loading { .. } | ModelState::Failed(_) => None,
    };
    let models = service.models().into_iter().filter_map(|status| model((status.name, status.state)));
    json!({
        "v": 1,
        "version": env!("CARGO_PKG_VERSION"),
        "node": options.node,
        "pool": options.pool,
        "device": service.device().name,
        "models": models.collect::<Vec<_>>(),
        "ops": Op::ALL.map(|(name, _)| name),
        "codecs": ["json"],
        "max_payload": options.payload_bytes_max,
        "limits": {
            "per_client": options.per_client, "pending": options.pending_max, "keep_s": options.keep.as_secs(),
            "deadline_s": options.deadline.as_secs(),
        },
    })
}

/// What has become of models and device since the last look: kind, whose, payload.
fn events(service: &Service, states: &mut BTreeMap<String, &'static str>) -> Vec<(&'static str, String, Value)> {
    let mut events = Vec::new();
    for status in service.models() {
        let (kind, reason) = match status.state {
            // One that is loaded on demand is no news until it was there.
            ModelState::Unloaded if states.contains_key(&format!("model {}", status.name)) => ("model_unloaded", None),
            ModelState::Unloaded | ModelState::Loading { .. } => continue,
            ModelState::Ready(_) => ("model_loaded", None),
            ModelState::Failed(reason) => ("model_failed", Some(reason)),
            ModelState::Elsewhere(upstream) => match upstream.reach {
                Reach::Unknown => continue,
                Reach::Up => ("model_loaded", None),
                Reach::Down(reason) => ("model_failed", Some(reason)),
            },
        };
        if states.insert(format!("model {}", status.name), kind) != Some(kind) {
            let payload = json!({ "v": 1, "model": status.name, "reason": reason });
            events.push((kind, status.name, payload));
        }
    }
    let device = service.device();
    let kind = if device.state == DeviceState::Recovering { "backend_failed" } else { "backend_ready" };
    let before = states.insert("device".to_owned(), kind);
    // That it is well is news only after it was not.
    if before != Some(kind) && (before.is_some() || kind == "backend_failed") {
        let payload = json!({ "v": 1, "device": device.name, "reason": device.last_fault });
        events.push((kind, device.name, payload));
    }
    events
}

/// Numbers of all models together; `sampled` is what it was the last time.
fn telemetry(service: &Service, sampled: &mut u64) -> Value {
    let models = service.models();
    let sum = |number: fn(&sparsed_engine::Stats) -> u64| models.iter().map(|model| number(&model.stats)).sum::<u64>();
    let now = sum(|stats| stats.sampled_tokens);
    let since = now.saturating_sub(std::mem::replace(sampled, now));
    let seconds = BEAT.as_secs() * TELEMETRY_LOOKS;
    json!({
        "v": 1,
        "ts": super::now_ms() / 1000,
        "tokens_per_s": since as f64 / seconds as f64,
        "running": sum(|stats| stats.load.running.into()),
        "waiting": sum(|stats| stats.load.waiting.into()),
        "kv_blocks_used": sum(|stats| stats.load.blocks_used.into()),
        "kv_blocks_total": sum(|stats| stats.load.blocks_total.into()),
    })
}
