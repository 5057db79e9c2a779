//! Which engine is it? What it says of its models (`owned_by`) tells, and with it which fields beyond OpenAI's it
//! knows.

/// A kind of engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    /// vLLM, and vllm-ascend, which is a plugin of it.
    Vllm,
    SgLang,
    LlamaCpp,
    Sparsed,
    /// Any other: OpenAI's fields only.
    OpenAi,
}

/// What an engine can tell of a request that is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Counting {
    /// How far the prompt is read, and the tokens of the answer: `return_progress`, `timings_per_token`.
    OfPromptToo,
    /// The tokens with each piece: `stream_options.continuous_usage_stats`.
    OfTokens,
    None,
}

impl Dialect {
    /// By `owned_by` of a model in the engine's list.
    pub(crate) fn of(owned_by: &str) -> Self {
        match owned_by {
            "vllm" => Self::Vllm,
            "sglang" => Self::SgLang,
            "llamacpp" => Self::LlamaCpp,
            "sparsed" => Self::Sparsed,
            _ => Self::OpenAi,
        }
    }

    /// For people.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vLLM",
            Self::SgLang => "SGLang",
            Self::LlamaCpp => "llama-server",
            Self::Sparsed => "sparsed",
            Self::OpenAi => "OpenAI-compatible",
        }
    }

    /// What it calls our `repetition_penalty`; `None`: it has none, nor `top_k`, `min_p`, `ignore_eos` and
    /// `chat_template_kwargs`, which go together.
    pub(crate) fn repetition_penalty(self) -> Option<&'static str> {
        match self {
            Self::Vllm | Self::SgLang | Self::Sparsed => Some("repetition_penalty"),
            Self::LlamaCpp => Some("repeat_penalty"),
            Self::OpenAi => None,
        }
    }

    /// Whether `top_k` off is -1; else it is 0.
    pub(crate) fn all_is_minus_one(self) -> bool {
        matches!(self, Self::Vllm | Self::SgLang)
    }

    /// Our `priority` as its own, which for SGLang is higher where ours is lower; `None`: it has none.
    pub(crate) fn priority(self, priority: i32) -> Option<i32> {
        match self {
            Self::Vllm | Self::Sparsed => Some(priority),
            Self::SgLang => Some(-priority),
            Self::LlamaCpp | Self::OpenAi => None,
        }
    }

    /// How it is asked to count while it answers.
    pub(crate) fn counting(self) -> Counting {
        match self {
            Self::LlamaCpp | Self::Sparsed => Counting::OfPromptToo,
            Self::Vllm | Self::SgLang => Counting::OfTokens,
            Self::OpenAi => Counting::None,
        }
    }

    /// Whether its `grammar` is in the dialect of ours. llama.cpp's is GBNF, SGLang's EBNF, vLLM's depends on its
    /// configuration.
    pub(crate) fn takes_lark(self) -> bool {
        self == Self::Sparsed
    }
}
