//! How is an evaluation shown to people? Tables of what the JSON holds.

use crate::ctl::number;
use serde_json::Value;

/// The whole result as text.
pub(super) fn table(result: &Value) -> String {
    let mut text = format!(
        "{}: {}, activations {}; {} tokens of text in {} documents\n",
        result["model"].as_str().unwrap_or_default(),
        indicatif::HumanBytes(result["file_bytes"].as_u64().unwrap_or(0)),
        result["activations"].as_str().unwrap_or_default(),
        result["texts"]["tokens"],
        result["texts"]["documents"],
    );
    for table in result["perplexity"].as_array().into_iter().flatten() {
        text += &perplexity(table);
        text += &mass(table);
    }
    for table in result["recall"].as_array().into_iter().flatten() {
        text += &recall(table);
    }
    for note in result["notes"].as_array().into_iter().flatten() {
        text += &format!("\nnote: {}\n", note.as_str().unwrap_or_default());
    }
    text.trim_end().to_owned()
}

fn perplexity(table: &Value) -> String {
    let mut text = format!(
        "\nPerplexity, context {}: {} windows, {} tokens scored\n{:<8} {:>8} {:>17} {:>16} {:>17} {:>16}\n",
        table["context"],
        table["windows"],
        table["scored_tokens"],
        "K",
        "PPL",
        "CROSS-ENTROPY",
        "RATIO",
        "LATE ENTROPY",
        "LATE RATIO",
    );
    for row in table["rows"].as_array().into_iter().flatten() {
        let k = row["top_k"].as_u64().map_or_else(|| "dense".to_owned(), |k| k.to_string());
        let (all, late) = (&row["all"], &row["late"]);
        let line = format!(
            "{k:<8} {:>8.3} {:>17} {:>16} {:>17} {:>16}\n",
            all["perplexity"].as_f64().unwrap_or(f64::NAN),
            with_error(&all["cross_entropy"], &all["cross_entropy_error"]),
            with_error(&all["ratio"], &all["ratio_error"]),
            with_error(&late["cross_entropy"], &late["cross_entropy_error"]),
            with_error(&late["ratio"], &late["ratio_error"]),
        );
        text += &line;
    }
    text
}

fn mass(table: &Value) -> String {
    let rows = || table["rows"].as_array().into_iter().flatten().filter(|row| row["mass"].is_object());
    let Some(layers) = rows().next().and_then(|row| row["mass"]["layers"].as_array()) else { return String::new() };
    let mut text = format!(
        "\nAttention mass kept, context {}: {} queries of each of {} windows, {} layers\n{:<8} {:>17} {:>8} {:>8} {:>8} {:>17} {:>20}\n",
        table["context"],
        table["mass_queries"],
        table["windows"],
        layers.len(),
        "K",
        "SELECTION",
        "ORACLE",
        "WINDOW",
        "RANDOM",
        "SHARE",
        "WORST LAYER'S SHARE",
    );
    for row in rows() {
        let mass = &row["mass"];
        let part = |name: &str| mass[name].as_f64().unwrap_or(f64::NAN);
        let worst = &mass["worst_layer"];
        let worst_share =
            worst.as_u64().and_then(|layer| mass["layers"][usize::try_from(layer).ok()?]["share_of_oracle"].as_f64());
        let line = format!(
            "{:<8} {:>17} {:>8.4} {:>8.4} {:>8.4} {:>17} {:>20}\n",
            number(&row["top_k"]),
            with_error(&mass["selection"], &mass["selection_error"]),
            part("oracle"),
            part("window"),
            part("random"),
            with_error(&mass["share_of_oracle"], &mass["share_error"]),
            format!("{:.4} ({worst})", worst_share.unwrap_or(f64::NAN)),
        );
        text += &line;
    }
    text
}

fn recall(table: &Value) -> String {
    let mut text = format!(
        "\nRecall, {} tokens: {} prompts about {} texts\n{:<12} {:>9} {:>17} {:>17}\n",
        table["length"], table["prompts"], table["contexts"], "ATTENTION", "EXACT", "DIGITS", "LOG-PROBABILITY",
    );
    for row in table["rows"].as_array().into_iter().flatten() {
        text += &recall_row(row);
        text.push('\n');
    }
    text
}

/// One line: a kind of attention and what it recalls.
pub(super) fn recall_row(row: &Value) -> String {
    let size = row["size"].as_u64().map_or(String::new(), |size| format!(" {size}"));
    format!(
        "{:<12} {:>9} {:>17} {:>17}",
        format!("{}{size}", row["attention"].as_str().unwrap_or_default()),
        format!("{}/{}", row["exact"], row["prompts"]),
        with_error(&row["digit_accuracy"], &row["digit_accuracy_error"]),
        with_error(&row["log_probability"], &row["log_probability_error"]),
    )
}

/// A number and its standard error, if it has one.
fn with_error(value: &Value, error: &Value) -> String {
    let value = value.as_f64().unwrap_or(f64::NAN);
    error.as_f64().map_or_else(|| format!("{value:.4}"), |error| format!("{value:.4} +-{error:.4}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_have_a_row_for_each_kind_of_attention() {
        let part = |ratio: f64| json!({ "cross_entropy": 3.0, "cross_entropy_error": null, "perplexity": 20.09, "ratio": ratio, "ratio_error": 0.001 });
        let result = json!({
            "model": "m", "file_bytes": 5_000_000, "activations": "f32", "texts": { "tokens": 9, "documents": 1 },
            "perplexity": [{ "context": 8, "windows": 1, "scored_tokens": 7, "rows": [
                { "top_k": null, "all": part(1.0), "late": part(1.0) },
                { "top_k": 4, "all": part(1.25), "late": part(1.5), "mass": {
                    "selection": 0.75, "selection_error": 0.01, "oracle": 0.8, "window": 0.5, "random": 0.25,
                    "share_of_oracle": 0.9375, "share_error": null, "worst_layer": 1,
                    "layers": [{ "share_of_oracle": 1.0 }, { "share_of_oracle": 0.875 }],
                } },
            ], "mass_queries": 2 }],
            "recall": [{ "length": 8, "prompts": 3, "contexts": 2, "rows": [
                { "attention": "window", "size": 4, "prompts": 3, "exact": 1, "digit_accuracy": 0.5,
                  "digit_accuracy_error": null, "log_probability": -1.0, "log_probability_error": 0.25 },
            ]}],
        });
        let text = table(&result);
        let rows: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert!(rows.contains(&vec!["4", "20.090", "3.0000", "1.2500", "+-0.0010", "3.0000", "1.5000", "+-0.0010"]));
        let mass = ["4", "0.7500", "+-0.0100", "0.8000", "0.5000", "0.2500", "0.9375", "0.8750", "(1)"];
        assert_eq!(rows.iter().filter(|row| row[..] == mass).count(), 1, "{text}");
        assert!(text.contains("context 8: 2 queries of each of 1 windows, 2 layers"), "{text}");
        assert!(text.contains("Recall, 8 tokens: 3 prompts about 2 texts"), "{text}");
        assert!(rows.contains(&vec!["window", "4", "1/3", "0.5000", "-1.0000", "+-0.2500"]), "{text}");
    }
}
