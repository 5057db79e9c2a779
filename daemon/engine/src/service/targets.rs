//! Who computes the model that a request names? A device of this box, or an engine elsewhere.

use super::{DEFAULT_MODEL, Keeping, ModelState, ModelStatus, Service};
use crate::api::{Failure, Request, Sink, UpstreamModel, UpstreamStatus};
use crate::telemetry::Board;
use std::sync::atomic::Ordering;

/// What Ollama's clients put behind a name that has no tag, on its paths and on OpenAI's.
const TAG: &str = ":latest";

impl Service {
    /// The engine that computes the model `name` in this box's place, as it was when it was asked last; it need not be
    /// reachable. `None` for a model of this box, and for one that is not configured.
    pub fn elsewhere(&self, name: &str) -> Option<UpstreamStatus> {
        self.upstream(name).map(|upstream| upstream.engine.status())
    }

    /// Hands a request to whoever computes its model; its events go to `sink`.
    ///
    /// # Errors
    /// What is wrong with the request, or that it cannot be taken now. The sink has heard nothing then.
    pub fn submit(&self, request: Request, sink: Box<dyn Sink>) -> Result<(), Failure> {
        let relay = match request {
            Request::Here(request) => return self.generate(*request, sink),
            Request::Elsewhere(relay) => relay,
        };
        if self.shared.stopping.load(Ordering::Relaxed) {
            return Err(Failure::ShuttingDown);
        }
        if relay.wishes.max_tokens == Some(0) {
            return Err(Failure::invalid("max_tokens", "is 0, must be at least 1"));
        }
        let unknown = || Failure::ModelNotFound { name: relay.model.clone(), known: self.known() };
        let upstream = self.upstream(&relay.model).ok_or_else(unknown)?;
        upstream.engine.submit(*relay, sink)
    }

    /// Whether any model is computed elsewhere.
    pub fn has_upstreams(&self) -> bool {
        !self.upstreams.is_empty()
    }

    /// The model `name` of an engine elsewhere. [`DEFAULT_MODEL`] is the first of them where this box has none.
    pub(super) fn upstream(&self, name: &str) -> Option<&UpstreamModel> {
        let name = self.untagged(name);
        let first = || self.upstreams.first().filter(|_| name == DEFAULT_MODEL && self.slots.is_empty());
        let called = |upstream: &&UpstreamModel| upstream.name == name || upstream.aliases.iter().any(|a| a == name);
        self.upstreams.iter().find(called).or_else(first)
    }

    /// What engines elsewhere serve, in the order of the configuration.
    pub(super) fn upstream_statuses(&self) -> impl Iterator<Item = ModelStatus> {
        self.upstreams.iter().map(|upstream| ModelStatus {
            name: upstream.name.clone(),
            aliases: upstream.aliases.clone(),
            state: ModelState::Elsewhere(upstream.engine.status()),
            stats: upstream.engine.stats(),
            board: Board::default(),
            keeping: Keeping::default(),
        })
    }

    /// `name`, or where that is another name of a model, the one in the configuration: what is kept for longer than a
    /// request, is kept under that.
    pub fn canonical<'n>(&'n self, name: &'n str) -> &'n str {
        let name = self.untagged(name);
        let found = self.names().find(|(_, aliases)| aliases.iter().any(|alias| alias == name));
        found.map_or(name, |(own, _)| own)
    }

    /// The name without Ollama's tag, unless a model is called just so.
    pub(super) fn untagged<'n>(&self, name: &'n str) -> &'n str {
        untagged(name, |name| {
            self.names().any(|(own, aliases)| own == name || aliases.iter().any(|alias| alias == name))
        })
    }

    /// What each model is called, and its other names.
    fn names(&self) -> impl Iterator<Item = (&str, &[String])> {
        let here = self.slots.iter().map(|slot| (slot.name.as_str(), &slot.aliases[..]));
        here.chain(self.upstreams.iter().map(|upstream| (upstream.name.as_str(), &upstream.aliases[..])))
    }

    /// Names of all models, for people.
    pub(super) fn known(&self) -> String {
        self.names().map(|(name, _)| name).collect::<Vec<_>>().join(", ")
    }
}

fn untagged(name: &str, is_known: impl Fn(&str) -> bool) -> &str {
    name.strip_suffix(TAG).filter(|_| !is_known(name)).unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_no_part_of_a_name_unless_a_model_is_called_so() {
        let untagged = |name: &'static str| untagged(name, |name| name == "own:latest");
        assert_eq!([untagged("m:latest"), untagged("m:7b"), untagged("m")], ["m", "m:7b", "m"]);
        assert_eq!(untagged("own:latest"), "own:latest");
    }
}
