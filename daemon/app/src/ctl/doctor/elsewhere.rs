//! Do the engines elsewhere answer that models are configured with?

use super::network::opens_network;
use super::service::Service;
use super::{Check, sets};
use crate::config::{Config, dotted};
use crate::upstream;
use sparsed_upstream::Address;

/// Whether each engine can be reached from here and has its model, and the service may reach it; asks all at a time.
pub(super) fn upstreams(config: &Config, service: Option<&Service>) -> Vec<Check> {
    // What is wrong with their files is told where those of all doors are looked at.
    let Ok(clients) = upstream::clients(config) else { return Vec::new() };
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else { return Vec::new() };
    runtime.block_on(async {
        let tasks =
            clients.into_iter().map(|(name, client)| (name, tokio::spawn(async move { client.describe().await })));
        let mut checks = Vec::new();
        for (name, task) in tasks.collect::<Vec<_>>() {
            let title = format!("model {name}");
            let fix = format!("start that engine, or {}", sets(&dotted(&["model", &name, "upstream"])));
            checks.push(match task.await {
                Ok(Ok(_)) if let Some(setting) = service.and_then(|service| shut(service, config, &name)) => {
                    let found = format!("its engine answers from here, sparsed.service has no network ({setting})");
                    Check::fail(title, found, opens_network())
                }
                Ok(Ok(there)) => {
                    let context = there.max_context.map_or(String::new(), |n| format!(", context {n}"));
                    Check::ok(title, format!("'{}' of {} elsewhere answers{context}", there.model, there.software()))
                }
                Ok(Err(failure)) => Check::fail(title, failure.to_string(), fix),
                Err(error) => Check::fail(title, error.to_string(), fix),
            });
        }
        checks
    })
}

/// The setting by which the service has no way to the engine of the model `name`.
fn shut(service: &Service, config: &Config, name: &str) -> Option<&'static str> {
    let address: Address = config.model.get(name)?.upstream.as_ref()?.parse().ok()?;
    service.has_no_way_to(address.host(), address.port())
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn an_engine_that_is_not_there_is_told_by_the_models_name() {
        let free = TcpListener::bind("127.0.0.1:0").and_then(|socket| socket.local_addr()).unwrap();
        let sets = [format!("model.big.upstream=http://{free}/v1")];
        let checks = upstreams(&Config::of(&sets), None);
        assert_eq!((checks.len(), checks[0].verdict, checks[0].name.as_str()), (1, Verdict::Fail, "model big"));
        assert!(checks[0].found.contains("cannot be reached"), "{checks:?}");
        assert!(upstreams(&Config::default(), None).is_empty());
    }
}
