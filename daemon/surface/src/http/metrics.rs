//! What does a monitoring system see? `GET /metrics`, and the same numbers for `/v1/status`.
//!
//! Where vLLM or llama.cpp's server have a metric it has their name, so that dashboards made for them work; what only
//! this daemon has begins with `sparsed_`. Everything is read anew at each scrape; nothing is registered globally.

use super::Shared;
use super::exposition::{CLASSIC, OPENMETRICS, classic, wants_openmetrics};
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeCounterValue, EncodeLabelSet, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Registry;
use sparsed_engine::memory::{Budget, Outlook};
use sparsed_engine::telemetry::{BUCKETS_S, BUCKETS_TOKENS, Histogram, What};
use sparsed_engine::{DeviceState, DeviceStatus, Left, ModelStatus, Service, SessionUsage, Sessions};
use std::fmt;

/// A number of a model: its name, what it is, and where it is found.
type Number<T> = (&'static str, &'static str, fn(&ModelStatus) -> T);

const GAUGES: &[Number<f64>] = &[
    ("vllm:num_requests_running", "Requests that run", |m| m.stats.load.running.into()),
    ("vllm:num_requests_waiting", "Requests that wait", |m| m.stats.load.waiting.into()),
    ("vllm:kv_cache_usage_perc", "KV blocks held, 1 is all", usage),
    ("vllm:gpu_cache_usage_perc", "As vllm:kv_cache_usage_perc, by its older name", usage),
    ("llamacpp:requests_processing", "Requests that run", |m| m.stats.load.running.into()),
    ("llamacpp:requests_deferred", "Requests that wait", |m| m.stats.load.waiting.into()),
    ("llamacpp:prompt_tokens_seconds", "Prompt tokens computed in a second, since the start", |m| {
        rate(read_tokens(m), m.stats.tally.prefill.sum)
    }),
    ("llamacpp:predicted_tokens_seconds", "Tokens of an answer in a second, since the start", |m| {
        rate(m.stats.sampled_tokens, m.stats.tally.decode.sum)
    }),
    ("llamacpp:n_tokens_max", "Most tokens that a prompt and its answer had", |m| m.stats.tally.longest_tokens.into()),
    ("llamacpp:n_busy_slots_per_decode", "Sequences of a step, on average", |m| {
        m.stats.tally.step_sequences as f64 / m.stats.steps.max(1) as f64
    }),
    ("llamacpp:kv_cache_usage_ratio", "KV blocks held, 1 is all; older llama.cpp's", usage),
    ("sparsed_model_ready", "Whether the model answers", |m| f64::from(m.state.answers())),
    ("sparsed_model_leases", "Requests and leases that keep the model in memory", |m| m.keeping.n_leases.into()),
    ("sparsed_memory_stage", "Responses to short memory: 0 none, 7 requests are refused", |m| {
        m.board.stage.number().into()
    }),
    ("sparsed_kv_blocks_max", "KV blocks that may be in use", |m| m.board.blocks_max.into()),
    ("sparsed_running_max", "Requests that may run", |m| m.board.running_max.into()),
    ("sparsed_prefill_chunk_tokens", "Prompt tokens of a step beside running answers, at most", |m| {
        m.board.chunk_tokens.into()
    }),
    ("sparsed_tokens_per_second", "Tokens computed in a second, lately", |m| m.board.tokens_per_s),
];

const COUNTERS: &[Number<u64>] = &[
    ("vllm:prompt_tokens", "Prompt tokens of answers that have begun", |m| m.stats.tally.prompt_tokens),
    ("vllm:prompt_tokens_cached", "Prompt tokens whose rows were there", |m| m.stats.tally.cached_tokens),
    ("vllm:generation_tokens", "Tokens sampled", |m| m.stats.sampled_tokens),
    ("vllm:prefix_cache_queries", "Prompt tokens that were looked for", |m| m.stats.tally.prompt_tokens),
    ("vllm:prefix_cache_hits", "Prompt tokens whose rows were there", |m| m.stats.tally.cached_tokens),
    ("vllm:num_preemptions", "Sequences that gave their blocks back", |m| m.stats.tally.preempted),
    ("llamacpp:prompt_tokens", "Prompt tokens that were computed, of answers that have begun", read_tokens),
    ("llamacpp:prompt_tokens_cached", "Prompt tokens whose rows were there", |m| m.stats.tally.cached_tokens),
    ("llamacpp:tokens_predicted", "Tokens sampled", |m| m.stats.sampled_tokens),
    ("llamacpp:n_decode", "Steps", |m| m.stats.steps),
    ("sparsed_steps", "Steps", |m| m.stats.steps),
    ("sparsed_computed_tokens", "Tokens that went through the model", |m| m.stats.computed_tokens),
    ("sparsed_again_tokens", "Tokens computed or restored again", |m| m.stats.tally.again_tokens),
    ("sparsed_restored_tokens", "Tokens whose rows came from a session's file", |m| m.stats.tally.restored_tokens),
    ("sparsed_saved_blocks", "KV blocks copied for a session's file", |m| m.stats.tally.saved_blocks),
    ("sparsed_demoted_blocks", "KV blocks moved to the slow tier", |m| m.stats.tally.demoted_blocks),
    ("sparsed_model_loads", "Times that the model was loaded", |m| m.keeping.n_loads),
    ("sparsed_failed_requests", "Requests without a whole answer", |m| m.stats.tally.failed),
];

const SECONDS: &[Number<f64>] = &[
    ("llamacpp:prompt_seconds", "Time for the prompts of answers that are complete", |m| m.stats.tally.prefill.sum),
    ("llamacpp:tokens_predicted_seconds", "Time for these answers after their first token", |m| {
        m.stats.tally.decode.sum
    }),
];

const HISTOGRAMS: &[Number<Histogram>] = &[
    ("vllm:time_to_first_token_seconds", "From arrival to the first token", |m| m.stats.tally.first_token),
    ("vllm:request_time_per_output_token_seconds", "Mean between two tokens of an answer", |m| m.stats.tally.per_token),
    ("vllm:inter_token_latency_seconds", "Between two tokens of an answer", |m| m.stats.tally.between_tokens),
    ("vllm:time_per_output_token_seconds", "As vllm:inter_token_latency_seconds, by its older name", |m| {
        m.stats.tally.between_tokens
    }),
    ("vllm:request_prefill_time_seconds", "From the first step to the first token", |m| m.stats.tally.prefill),
    ("vllm:request_decode_time_seconds", "From the first token to the last", |m| m.stats.tally.decode),
    ("vllm:request_inference_time_seconds", "From the first step to the last token", |m| m.stats.tally.inference),
    ("vllm:request_queue_time_seconds", "From arrival to the first step", |m| m.stats.tally.queue),
    ("vllm:e2e_request_latency_seconds", "From arrival to the end", |m| m.stats.tally.whole),
];

const LENGTHS: &[Number<Histogram>] = &[
    ("vllm:request_prompt_tokens", "Tokens of prompts whose answer is complete", |m| m.stats.tally.prompt_length),
    ("vllm:request_generation_tokens", "Tokens of these answers", |m| m.stats.tally.answer_length),
];

/// Prompt tokens that had to be computed.
fn read_tokens(model: &ModelStatus) -> u64 {
    model.stats.tally.prompt_tokens.saturating_sub(model.stats.tally.cached_tokens)
}

fn rate(tokens: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { tokens as f64 / seconds } else { 0.0 }
}

fn usage(model: &ModelStatus) -> f64 {
    let load = &model.stats.load;
    f64::from(load.blocks_used) / f64::from(load.blocks_total.max(1))
}

/// `GET /metrics`.
pub(crate) async fn metrics(State(shared): State<Shared>, headers: HeaderMap) -> Response {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Scrape::of(&shared.service)));
    let mut body = String::new();
    if text::encode(&mut body, &registry).is_err() {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    }
    let (format, body) = if wants_openmetrics(&headers) { (OPENMETRICS, body) } else { (CLASSIC, classic(&body)) };
    ([(header::CONTENT_TYPE, HeaderValue::from_static(format))], body).into_response()
}

/// All that a scrape shows.
#[derive(Debug)]
struct Scrape {
    models: Vec<ModelStatus>,
    device: DeviceStatus,
    budget: Budget,
    outlook: Outlook,
    /// Where sessions are kept.
    sessions: Option<SessionUsage>,
}

impl Scrape {
    fn of(service: &Service) -> Self {
        Self {
            models: service.models(),
            device: service.device(),
            budget: service.budget(),
            outlook: service.outlook(),
            sessions: service.sessions().ok().and_then(Sessions::usage),
        }
    }

    /// Blocks by where they are.
    fn encode_blocks(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let mut family = encoder.encode_descriptor("sparsed_kv_blocks", "KV blocks", None, MetricType::Gauge)?;
        for model in &self.models {
            let load = &model.stats.load;
            let states = [
                ("held", load.blocks_used),
                ("cached", load.blocks_cached),
                ("slow", load.blocks_slow),
                ("all", load.blocks_total),
            ];
            for (state, n) in states {
                let labels = [("model_name", model.name.as_str()), ("state", state)];
                family.encode_family(&labels)?.encode_gauge(&i64::from(n))?;
            }
        }
        Ok(())
    }

    fn encode_ends(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = ("vllm:request_success", "Answers by their end");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for model in &self.models {
            for (reason, n) in ["stop", "length", "tool_calls"].into_iter().zip(model.stats.tally.finished) {
                let labels = [("model_name", model.name.as_str()), ("finished_reason", reason)];
                family.encode_family(&labels)?.encode_counter::<[(&str, &str); 0], _, u64>(&n, None)?;
            }
        }
        let (name, help) = ("sparsed_decisions", "Decisions of the scheduler; the log has their reasons");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for model in &self.models {
            for (what, n) in What::ALL.into_iter().zip(model.stats.tally.decisions) {
                let labels = [("model_name", model.name.as_str()), ("decision", what.name())];
                family.encode_family(&labels)?.encode_counter::<[(&str, &str); 0], _, u64>(&n, None)?;
            }
        }
        let (name, help) = ("sparsed_model_unloads", "Times that the model has left the memory, and why");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for model in &self.models {
            for (why, n) in Left::ALL.into_iter().zip(model.keeping.n_left) {
                let labels = [("model_name", model.name.as_str()), ("reason", why.name())];
                family.encode_family(&labels)?.encode_counter::<[(&str, &str); 0], _, u64>(&n, None)?;
            }
        }
        Ok(())
    }

    fn encode_machine(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let (name, help) = ("sparsed_memory_limit_bytes", "What may be taken, as reckoned at the start");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for bound in &self.budget.bounds {
            family.encode_family(&[("limit", bound.limit.name())])?.encode_gauge(&signed(bound.bytes))?;
        }
        let numbers = [
            ("sparsed_memory_pressure", "0 none, 1 some, 2 critical", self.outlook.pressure as i64),
            ("sparsed_memory_headroom_bytes", "Bytes that may be taken yet", self.outlook.headroom_bytes),
            ("sparsed_memory_weights_bytes", "Bytes of weights", signed(self.budget.weights_bytes)),
            ("sparsed_memory_workspace_bytes", "Bytes of workspaces", signed(self.budget.workspace_bytes)),
            ("sparsed_memory_kv_bytes", "Bytes for KV caches", signed(self.budget.for_kv().unwrap_or(0))),
            ("sparsed_device_up", "Whether a device computes", i64::from(self.device.state == DeviceState::Ready)),
        ];
        for (name, help, value) in numbers {
            encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&value)?;
        }
        let (name, help) = ("sparsed_device_faults", "Times that a device was lost or could not be had");
        let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        metric.encode_counter::<[(&str, &str); 0], _, u64>(&self.device.n_faults, None)
    }

    /// What sessions take of the disk, and what was written for them: flash memory wears out.
    fn encode_sessions(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        let Some(usage) = self.sessions else { return Ok(()) };
        let (name, help) = ("sparsed_sessions", "Sessions");
        encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&signed(usage.sessions))?;
        let (name, help) = ("sparsed_sessions_of_other_key", "Sessions of another master key, which nobody sees");
        encoder.encode_descriptor(name, help, None, MetricType::Gauge)?.encode_gauge(&signed(usage.of_other_key))?;
        let (name, help) = ("sparsed_session_disk_bytes", "Bytes of sessions' files");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
        for (file, n_bytes) in [("journal", usage.journal_bytes), ("kv", usage.kv_bytes)] {
            family.encode_family(&[("file", file)])?.encode_gauge(&signed(n_bytes))?;
        }
        let (name, help) = ("sparsed_session_written_bytes", "Bytes written to sessions' files, since the start");
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (file, n_bytes) in [("journal", usage.journal_bytes_written), ("kv", usage.kv_bytes_written)] {
            let labels = [("file", file)];
            let mut metric = family.encode_family(&labels)?;
            metric.encode_counter::<[(&str, &str); 0], _, u64>(&n_bytes, None)?;
        }
        Ok(())
    }

    fn encode_counters<N: EncodeCounterValue>(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        counters: &[Number<N>],
    ) -> fmt::Result {
        for (name, help, value) in counters {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for model in &self.models {
                let labels = label(model);
                let mut metric = family.encode_family(&labels)?;
                metric.encode_counter::<[(&str, &str); 0], _, u64>(&value(model), None)?;
            }
        }
        Ok(())
    }

    fn encode_histograms(
        &self,
        encoder: &mut DescriptorEncoder<'_>,
        histograms: &[Number<Histogram>],
        ends: [f64; BUCKETS_S.len()],
    ) -> fmt::Result {
        for (name, help, value) in histograms {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Histogram)?;
            for model in &self.models {
                let histogram = value(model);
                let ends = ends.into_iter().chain([f64::INFINITY]);
                let buckets: Vec<(f64, u64)> = ends.zip(histogram.counts).collect();
                let labels = label(model);
                let mut metric = family.encode_family(&labels)?;
                metric.encode_histogram::<[(&str, &str); 0]>(histogram.sum, histogram.count(), &buckets, None)?;
            }
        }
        Ok(())
    }
}

impl Collector for Scrape {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        for (name, help, value) in GAUGES {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for model in &self.models {
                family.encode_family(&label(model))?.encode_gauge(&value(model))?;
            }
        }
        self.encode_counters(&mut encoder, COUNTERS)?;
        self.encode_counters(&mut encoder, SECONDS)?;
        self.encode_histograms(&mut encoder, HISTOGRAMS, BUCKETS_S)?;
        self.encode_histograms(&mut encoder, LENGTHS, BUCKETS_TOKENS)?;
        self.encode_blocks(&mut encoder)?;
        self.encode_ends(&mut encoder)?;
        self.encode_machine(&mut encoder)?;
        self.encode_sessions(&mut encoder)
    }
}

fn label(model: &ModelStatus) -> impl EncodeLabelSet + use<'_> {
    [("model_name", model.name.as_str())]
}

fn signed(bytes: u64) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use sparsed_engine::memory::Limit;
    use sparsed_engine::telemetry::Board;
    use sparsed_engine::{Keeping, ModelState, Stats};

    fn scrape() -> Scrape {
        let mut stats = Stats { sampled_tokens: 7, steps: 3, ..Stats::default() };
        (stats.load.running, stats.load.blocks_used, stats.load.blocks_total) = (2, 1, 4);
        stats.tally.first_token.counts[3] = 2;
        stats.tally.first_token.counts[20] = 1;
        stats.tally.first_token.sum = 700.5;
        stats.tally.finished[1] = 9;
        (stats.tally.prompt_tokens, stats.tally.cached_tokens, stats.tally.prefill.sum) = (50, 20, 1.5);
        let state = ModelState::Failed("no \"file\"".to_owned());
        let keeping = Keeping { n_loads: 3, n_left: [2, 0, 1], ..Keeping::default() };
        let (name, aliases) = ("a\"b".to_owned(), Vec::new());
        let model = ModelStatus { name, aliases, state, stats, board: Board::default(), keeping };
        let device = DeviceStatus {
            name: "cpu".to_owned(),
            state: DeviceState::Ready,
            last_fault: None,
            n_faults: 4,
            backend_changed: false,
            chosen: None,
        };
        let mut budget = Budget::default();
        budget.bind(Limit::CgroupHigh, 1000);
        let (kv_bytes, kv_bytes_written) = (900, 5000);
        let kept = SessionUsage { sessions: 2, of_other_key: 3, kv_bytes, kv_bytes_written, ..SessionUsage::default() };
        Scrape { models: vec![model], device, budget, outlook: Outlook::default(), sessions: Some(kept) }
    }

    fn text_of(scrape: Scrape) -> String {
        let mut registry = Registry::default();
        registry.register_collector(Box::new(scrape));
        let mut body = String::new();
        text::encode(&mut body, &registry).unwrap();
        body
    }

    #[test]
    fn dashboards_of_vllm_and_llama_cpp_find_their_names() {
        let body = text_of(scrape());
        for line in [
            "vllm:num_requests_running{model_name=\"a\\\"b\"} 2.0",
            "vllm:kv_cache_usage_perc{model_name=\"a\\\"b\"} 0.25",
            "vllm:generation_tokens_total{model_name=\"a\\\"b\"} 7",
            "vllm:prompt_tokens_total{model_name=\"a\\\"b\"} 50",
            "llamacpp:prompt_tokens_total{model_name=\"a\\\"b\"} 30",
            "llamacpp:prompt_tokens_cached_total{model_name=\"a\\\"b\"} 20",
            "llamacpp:prompt_seconds_total{model_name=\"a\\\"b\"} 1.5",
            "llamacpp:prompt_tokens_seconds{model_name=\"a\\\"b\"} 20.0",
            "# TYPE vllm:request_prefill_time_seconds histogram",
            "llamacpp:tokens_predicted_total{model_name=\"a\\\"b\"} 7",
            "vllm:request_success_total{model_name=\"a\\\"b\",finished_reason=\"length\"} 9",
            "sparsed_memory_limit_bytes{limit=\"cgroup_high\"} 1000",
            "sparsed_device_faults_total 4",
            "sparsed_sessions 2",
            "sparsed_sessions_of_other_key 3",
            "sparsed_session_disk_bytes{file=\"kv\"} 900",
            "sparsed_session_written_bytes_total{file=\"kv\"} 5000",
            "sparsed_session_written_bytes_total{file=\"journal\"} 0",
            "sparsed_model_loads_total{model_name=\"a\\\"b\"} 3",
            "sparsed_model_unloads_total{model_name=\"a\\\"b\",reason=\"pressure\"} 1",
            "# TYPE vllm:time_to_first_token_seconds histogram",
        ] {
            assert!(body.lines().any(|have| have == line), "no '{line}' in:\n{body}");
        }
        assert!(body.ends_with("# EOF\n"));
    }

    /// Names of vLLM 0.32 (`vllm/v1/metrics/loggers.py`), the two that older versions had, and those of llama.cpp
    /// (`tools/server/server-task.cpp`) with one of its older ones: no others may begin as theirs do.
    #[test]
    fn no_name_is_given_to_vllm_or_llama_cpp_that_they_do_not_have() {
        let theirs = [
            "llamacpp:kv_cache_usage_ratio gauge",
            "llamacpp:n_busy_slots_per_decode gauge",
            "llamacpp:n_decode counter",
            // A counter there, whose name OpenMetrics would not let stand.
            "llamacpp:n_tokens_max gauge",
            "llamacpp:predicted_tokens_seconds gauge",
            "llamacpp:prompt_seconds counter",
            "llamacpp:prompt_tokens counter",
            "llamacpp:prompt_tokens_cached counter",
            "llamacpp:prompt_tokens_seconds gauge",
            "llamacpp:requests_deferred gauge",
            "llamacpp:requests_processing gauge",
            "llamacpp:tokens_predicted counter",
            "llamacpp:tokens_predicted_seconds counter",
            "vllm:e2e_request_latency_seconds histogram",
            "vllm:generation_tokens counter",
            "vllm:gpu_cache_usage_perc gauge",
            "vllm:inter_token_latency_seconds histogram",
            "vllm:kv_cache_usage_perc gauge",
            "vllm:num_preemptions counter",
            "vllm:num_requests_running gauge",
            "vllm:num_requests_waiting gauge",
            "vllm:prefix_cache_hits counter",
            "vllm:prefix_cache_queries counter",
            "vllm:prompt_tokens counter",
            "vllm:prompt_tokens_cached counter",
            "vllm:request_decode_time_seconds histogram",
            "vllm:request_generation_tokens histogram",
            "vllm:request_inference_time_seconds histogram",
            "vllm:request_prefill_time_seconds histogram",
            "vllm:request_prompt_tokens histogram",
            "vllm:request_queue_time_seconds histogram",
            "vllm:request_success counter",
            "vllm:request_time_per_output_token_seconds histogram",
            "vllm:time_per_output_token_seconds histogram",
            "vllm:time_to_first_token_seconds histogram",
        ];
        let body = text_of(scrape());
        let types = body.lines().filter_map(|line| line.strip_prefix("# TYPE "));
        let mut ours: Vec<&str> = types.filter(|line| !line.starts_with("sparsed_")).collect();
        ours.sort_unstable();
        assert_eq!(ours, theirs);
    }

    #[test]
    fn buckets_of_a_histogram_add_up() {
        let body = text_of(scrape());
        let bucket = |end: &str| {
            let start = format!("vllm:time_to_first_token_seconds_bucket{{le=\"{end}\",model_name=\"a\\\"b\"}} ");
            body.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or_else(|| panic!("{body}")).to_owned()
        };
        assert_eq!(
            (bucket("0.005"), bucket("0.01"), bucket("640.0"), bucket("+Inf")),
            ("0".into(), "2".into(), "2".into(), "3".into())
        );
    }
}
