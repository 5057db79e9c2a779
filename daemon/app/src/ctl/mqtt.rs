//! `sparsectl mqtt test`: is the node reached by its broker?

use crate::config::{Paths, Source};
use anyhow::Context;
use serde_json::json;
use sparsed_surface::mqtt_probe;
use std::time::Duration;

/// Try MQTT.
#[derive(Debug, clap::Args)]
pub(super) struct Mqtt {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Ask a node something by its broker, with the daemon's own configuration.
    Test(Test),
}

#[derive(Debug, clap::Args)]
struct Test {
    #[command(flatten)]
    source: Source,
    /// Another node than this one.
    #[arg(long)]
    node: Option<String>,
    /// What it is to go on with.
    #[arg(long, default_value = "Hello")]
    prompt: String,
    /// Seconds that all of it may take.
    #[arg(long, default_value_t = 30)]
    timeout_s: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

impl Mqtt {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let Command::Test(test) = self.command;
        test.run()
    }
}

impl Test {
    fn run(self) -> anyhow::Result<()> {
        let config = self.source.load()?;
        let options = crate::mqtt::options(&config, &Paths::of(&config))?;
        let mut options = options.context("there is no broker in the configuration (mqtt.broker)")?;
        if let Some(node) = self.node {
            options.node = node;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let probe = mqtt_probe(&options, &self.prompt, Duration::from_secs(self.timeout_s));
        let probe = runtime.block_on(probe)?;
        let status = probe.status.as_ref().and_then(|status| status["state"].as_str()).unwrap_or("unknown");
        let (connected_ms, answered_ms) = (probe.connected.as_millis(), probe.answered.as_millis());
        if self.json {
            return super::print_json(&json!({
                "node": options.node, "status": status, "connected_ms": u64::try_from(connected_ms)?,
                "answered_ms": u64::try_from(answered_ms)?, "answer": probe.answer,
            }));
        }
        let encrypted = if options.tls.is_some() { "with TLS" } else { "without TLS" };
        super::print(&format!("broker {}:{} {encrypted}: connected in {connected_ms} ms", options.host, options.port))?;
        super::print(&format!("node {}: {status}", options.node))?;
        match probe.answer["message"].as_str() {
            Some(message) => anyhow::bail!("the node answers with an error: {message}"),
            None => super::print(&format!(
                "answered in {answered_ms} ms: {:?}",
                probe.answer["text"].as_str().unwrap_or("-")
            )),
        }
    }
}
