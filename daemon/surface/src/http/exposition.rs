//! Which text format does a scraper read? OpenMetrics where it asks for that, else Prometheus' own, which all read.

use axum::http::{HeaderMap, header};
use std::collections::BTreeSet;

/// What [`classic`] gives.
pub(super) const CLASSIC: &str = "text/plain; version=0.0.4; charset=utf-8";
/// What `prometheus_client` writes.
pub(super) const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Whether the scraper names OpenMetrics among what it takes.
pub(super) fn wants_openmetrics(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(header::ACCEPT).iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|media| media.trim().starts_with("application/openmetrics-text"))
}

/// The same metrics in Prometheus' format 0.0.4: a counter's family is called as its samples are, `..._total`, and
/// there is no end mark.
pub(super) fn classic(openmetrics: &str) -> String {
    let is_counter = |line: &str| Some(line.strip_prefix("# TYPE ")?.strip_suffix(" counter")?.to_owned());
    let counters: BTreeSet<String> = openmetrics.lines().filter_map(is_counter).collect();
    let mut text = String::with_capacity(openmetrics.len());
    for line in openmetrics.lines().filter(|line| *line != "# EOF") {
        let about = line.strip_prefix("# ").and_then(|about| {
            let (what, rest) = about.split_once(' ')?;
            let (family, rest) = rest.split_once(' ')?;
            counters.contains(family).then(|| format!("# {what} {family}_total {rest}"))
        });
        text += about.as_deref().unwrap_or(line);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_called_as_their_samples_and_the_rest_stays() {
        let openmetrics = "# HELP a:x Tokens.\n# TYPE a:x counter\na:x_total{m=\"1\"} 7\n# HELP y_total Blocks.\n\
                           # TYPE y_total gauge\ny_total 2\n# HELP z Seconds.\n# TYPE z histogram\nz_count 0\n# EOF\n";
        let expected = "# HELP a:x_total Tokens.\n# TYPE a:x_total counter\na:x_total{m=\"1\"} 7\n# HELP y_total Blocks.\n\
                        # TYPE y_total gauge\ny_total 2\n# HELP z Seconds.\n# TYPE z histogram\nz_count 0\n";
        assert_eq!(classic(openmetrics), expected);
    }

    #[test]
    fn openmetrics_is_for_those_who_name_it() {
        let accepting =
            |value: &str| wants_openmetrics(&[(header::ACCEPT, value.parse().unwrap())].into_iter().collect());
        assert!(accepting("application/openmetrics-text;version=1.0.0;q=0.6,text/plain;version=0.0.4;q=0.5,*/*;q=0.1"));
        assert!(!accepting("text/plain;version=0.0.4") && !accepting("*/*") && !wants_openmetrics(&HeaderMap::new()));
    }
}
