//! What does the other engine serve? Its list of models, `GET /models`.

use crate::dialect::Dialect;
use crate::trouble::{Trouble, clean};
use serde::Deserialize;

/// Most models of a list that are looked at.
const MODELS_MAX: usize = 4096;
/// Most of them that a message names.
const NAMED_MAX: usize = 8;

/// The model that is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Described {
    /// Its name there.
    pub model: String,
    /// Tokens of prompt and answer together, where the engine says.
    pub max_context: Option<u32>,
    pub(crate) dialect: Dialect,
}

#[derive(Deserialize)]
struct List {
    data: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    id: String,
    owned_by: Option<String>,
    /// vLLM's, SGLang's and ours.
    max_model_len: Option<u32>,
    /// llama.cpp's.
    meta: Option<Meta>,
}

#[derive(Deserialize)]
struct Meta {
    n_ctx: Option<u32>,
}

impl Described {
    /// Which software it is, as far as it says.
    pub fn software(&self) -> &'static str {
        self.dialect.name()
    }

    /// The model `wanted` of a list, or else its first.
    ///
    /// # Errors
    /// No list of models, or none with this one.
    pub(crate) fn find(list: &[u8], wanted: Option<&str>) -> Result<Self, Trouble> {
        let List { data } = serde_json::from_slice(list)
            .map_err(|_| Trouble::Broken("what it answers to GET /models is no list of models".to_owned()))?;
        let mut entries = data.into_iter().take(MODELS_MAX);
        let mut others = Vec::new();
        let found = entries.find(|entry| {
            let is_wanted = wanted.is_none_or(|wanted| entry.id == wanted);
            if !is_wanted && others.len() < NAMED_MAX {
                others.push(clean(&entry.id, None));
            }
            is_wanted
        });
        let entry = found.ok_or_else(|| match wanted {
            Some(wanted) => Trouble::Failed(format!("it does not serve '{wanted}'; it serves {}", others.join(", "))),
            None => Trouble::Failed("it serves no model".to_owned()),
        })?;
        let context = entry.max_model_len.or_else(|| entry.meta?.n_ctx);
        Ok(Self {
            model: entry.id,
            max_context: context.filter(|&tokens| tokens > 0),
            dialect: Dialect::of(entry.owned_by.as_deref().unwrap_or_default()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(list: &str, wanted: Option<&str>) -> Result<Described, String> {
        Described::find(list.as_bytes(), wanted).map_err(|trouble| trouble.failure("big").to_string())
    }

    #[test]
    fn each_engine_says_what_it_is_and_how_much_it_holds() {
        let vllm = r#"{"object": "list", "data": [{"id": "ds", "owned_by": "vllm", "max_model_len": 4096}]}"#;
        let found = find(vllm, None).unwrap();
        assert_eq!((found.model.as_str(), found.max_context, found.software()), ("ds", Some(4096), "vLLM"));
        let llama = r#"{"models": [], "data": [{"id": "a"}, {"id": "b", "owned_by": "llamacpp", "meta": {"n_ctx": 512, "n_ctx_train": 8192}}]}"#;
        let found = find(llama, Some("b")).unwrap();
        assert_eq!((found.max_context, found.software()), (Some(512), "llama-server"));
        assert_eq!(find(llama, None).unwrap().software(), "OpenAI-compatible");
    }

    #[test]
    fn a_model_that_is_not_there_is_named_with_those_that_are() {
        let said = find(r#"{"data": [{"id": "a"}, {"id": "b"}]}"#, Some("c")).unwrap_err();
        assert!(said.ends_with("it does not serve 'c'; it serves a, b"), "{said}");
        assert!(find(r#"{"data": []}"#, None).unwrap_err().ends_with("it serves no model"));
        assert!(find("<html>", None).unwrap_err().ends_with("no list of models"));
    }
}
