//! How does a conversation become one text? The file's own Jinja template, rendered by `minijinja` with limits.

use crate::{ModelError, Tokenizer};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};
use sparsed_quant::gguf::Metadata;

/// Steps that a template may take.
const FUEL: u64 = 10_000_000;
/// Largest rendered prompt in bytes.
const OUTPUT_BYTES_MAX: usize = 16 << 20;
/// Largest template in bytes.
const TEMPLATE_BYTES_MAX: usize = 1 << 20;

/// What a file without a template gets when its tokens are ChatML's.
const CHATML: &str = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
    {% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";

/// One message of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChatMessage {
    /// `system`, `user`, `assistant`, ...
    pub role: String,
    /// The text.
    pub content: String,
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

impl ChatTemplate {
    pub(crate) fn from_metadata(metadata: &Metadata, tokenizer: &Tokenizer) -> Result<Option<Self>, ModelError> {
        let source = match metadata.str("tokenizer.chat_template")? {
            Some(source) => source.to_owned(),
            None if tokenizer.token_id("<|im_start|>").is_some() => CHATML.to_owned(),
            None => return Ok(None),
        };
        let name = |id: Option<u32>| id.and_then(|id| tokenizer.token_name(id)).unwrap_or_default().to_owned();
        Self::compile(source, name(tokenizer.bos()), name(tokenizer.end_tokens().first().copied())).map(Some)
    }

    fn compile(source: String, bos: String, eos: String) -> Result<Self, ModelError> {
        if source.len() > TEMPLATE_BYTES_MAX {
            return Err(ModelError::Template(format!("{} bytes, the limit is {TEMPLATE_BYTES_MAX}", source.len())));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As Hugging Face renders templates.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|error| ModelError::Template(format!("{error:#}")))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |text: String| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, text))
        });
        // Python's json.dumps with ensure_ascii off, which templates were written for.
        environment.add_filter("tojson", |value: Value| -> Result<Value, Error> {
            let text =
                serde_json::to_string(&value).map_err(|e| Error::new(ErrorKind::BadSerialization, e.to_string()))?;
            Ok(Value::from_safe_string(text))
        });
        let compiled = environment.add_template_owned("chat", source);
        compiled.map_err(|error| ModelError::Template(format!("{error:#}")))?;
        Ok(Self { environment, bos, eos })
    }

    /// The prompt for the next answer to `messages`.
    ///
    /// # Errors
    /// The template's own refusal, a template that does not end, a prompt over 16 MiB.
    pub fn render(&self, messages: &[ChatMessage]) -> Result<String, ModelError> {
        let fail = |error: Error| ModelError::Template(format!("{error:#}"));
        let messages: Vec<Value> =
            messages.iter().map(|m| context! { role => m.role.as_str(), content => m.content.as_str() }).collect();
        let template = self.environment.get_template("chat").map_err(fail)?;
        let rendered = template.render(context! {
            messages,
            add_generation_prompt => true,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        });
        let rendered = rendered.map_err(fail)?;
        if rendered.len() > OUTPUT_BYTES_MAX {
            return Err(ModelError::Template(format!(
                "{} bytes rendered, the limit is {OUTPUT_BYTES_MAX}",
                rendered.len()
            )));
        }
        Ok(rendered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        ChatTemplate::compile(source.to_owned(), "<s>".to_owned(), "</s>".to_owned()).unwrap()
    }

    fn user(content: &str) -> Vec<ChatMessage> {
        vec![ChatMessage { role: "user".to_owned(), content: content.to_owned() }]
    }

    #[test]
    fn chatml_opens_the_assistants_turn() {
        let text = template(CHATML).render(&user("Hi")).unwrap();
        assert_eq!(text, "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n");
    }

    #[test]
    fn python_methods_and_json_work() {
        let text =
            template("{{ bos_token }}{{ messages[0]['content'].strip() | tojson }}").render(&user(" \u{e9} ")).unwrap();
        assert_eq!(text, "<s>\"\u{e9}\"");
    }

    #[test]
    fn a_refusal_and_an_endless_template_are_errors() {
        let refused = template("{{ raise_exception('roles must alternate') }}").render(&user("x")).unwrap_err();
        assert!(refused.to_string().contains("roles must alternate"));
        let endless = "{% for a in range(100000) %}{% for b in range(100000) %}x{% endfor %}{% endfor %}";
        assert!(template(endless).render(&user("x")).is_err());
        assert!(ChatTemplate::compile("{% for %}".to_owned(), String::new(), String::new()).is_err());
    }
}
