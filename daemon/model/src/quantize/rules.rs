//! Which tensor is stored how? The table of mixed precision, in one place; [`super`] states it for readers.

use sparsed_quant::Format;

/// A way to store a model, by llama.cpp's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    name: &'static str,
    /// `general.file_type`, llama.cpp's number.
    pub(super) file_type: u32,
    /// Of every matrix that no rule excepts.
    base: Format,
    /// More bits for what values and results flow through (`_M`).
    mixed: bool,
}

const RECIPES: [Recipe; 13] = [
    Recipe { name: "F32", file_type: 0, base: Format::F32, mixed: false },
    Recipe { name: "F16", file_type: 1, base: Format::F16, mixed: false },
    Recipe { name: "BF16", file_type: 32, base: Format::BF16, mixed: false },
    Recipe { name: "Q8_0", file_type: 7, base: Format::Q8_0, mixed: false },
    Recipe { name: "Q6_K", file_type: 18, base: Format::Q6_K, mixed: false },
    Recipe { name: "Q5_K_M", file_type: 17, base: Format::Q5_K, mixed: true },
    Recipe { name: "Q5_K", file_type: 16, base: Format::Q5_K, mixed: false },
    Recipe { name: "Q5_1", file_type: 9, base: Format::Q5_1, mixed: false },
    Recipe { name: "Q5_0", file_type: 8, base: Format::Q5_0, mixed: false },
    Recipe { name: "Q4_K_M", file_type: 15, base: Format::Q4_K, mixed: true },
    Recipe { name: "Q4_K", file_type: 14, base: Format::Q4_K, mixed: false },
    Recipe { name: "Q4_1", file_type: 3, base: Format::Q4_1, mixed: false },
    Recipe { name: "Q4_0", file_type: 2, base: Format::Q4_0, mixed: false },
];

/// What a rule needs to know about a tensor.
#[derive(Clone, Copy, Debug)]
pub(super) struct Subject<'a> {
    pub(super) name: &'a str,
    pub(super) dims: &'a [u64],
    pub(super) format: Format,
}

/// What the rules need to know about the file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whole {
    pub(super) n_layers: u64,
    /// The embedding is the output matrix too.
    pub(super) tied: bool,
    /// It comes from a Hugging Face folder.
    pub(super) is_folder: bool,
}

/// How a tensor is stored, and whether its rows forbade what was wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    pub(super) format: Format,
    pub(super) instead_of: Option<Format>,
}

impl Recipe {
    /// Every recipe's name, the largest first.
    pub fn names() -> impl Iterator<Item = &'static str> {
        RECIPES.iter().map(|recipe| recipe.name)
    }

    /// The recipe of this name, in either case.
    pub fn from_name(name: &str) -> Option<Self> {
        RECIPES.into_iter().find(|recipe| recipe.name.eq_ignore_ascii_case(name))
    }

    pub(super) fn choose(self, subject: &Subject<'_>, whole: &Whole) -> Choice {
        if stays(subject.name, subject.dims) {
            // As llama.cpp's converter has it: its operators take single precision there.
            let single = match subject.format {
                Format::BF16 => true,
                Format::F16 => whole.is_folder,
                _ => false,
            };
            return Choice { format: if single { Format::F32 } else { subject.format }, instead_of: None };
        }
        let wanted = self.wanted(subject.name, whole);
        let mut format = wanted;
        while !subject.dims[0].is_multiple_of(format.block_values() as u64) {
            format = with_smaller_blocks(format);
        }
        Choice { format, instead_of: (format != wanted).then_some(wanted) }
    }

    fn wanted(self, name: &str, whole: &Whole) -> Format {
        let part = name.strip_prefix("blk.").and_then(|rest| rest.split_once('.'));
        let Some((layer, part)) = part else {
            let output = name == "output.weight" || whole.tied && name == "token_embd.weight";
            return if output { at_least(self.base, Format::Q6_K) } else { self.base };
        };
        if part.starts_with("indexer.") {
            return at_least(self.base, Format::Q8_0);
        }
        let more = layer.parse().is_ok_and(|layer| gets_more_bits(layer, whole.n_layers));
        match part {
            _ if !self.mixed => self.base,
            "attn_v.weight"
            | "attn_v_b.weight"
            | "attn_kv_b.weight"
            | "ffn_down.weight"
            | "ffn_down_exps.weight"
            | "ffn_down_shexp.weight"
                if more =>
            {
                at_least(self.base, Format::Q6_K)
            }
            "attn_kv_a_mqa.weight" | "attn_kv_a.weight" if more => at_least(self.base, Format::Q6_K),
            "attn_kv_a_mqa.weight" | "attn_kv_a.weight" => at_least(self.base, Format::Q5_K),
            _ => self.base,
        }
    }
}

/// Tensors that are small, and whose errors steer: vectors, norms, biases, the router, the indexer's head weights.
fn stays(name: &str, dims: &[u64]) -> bool {
    let steers = ["_norm", "ffn_gate_inp", "exp_probs_b", "indexer.proj", "rope_freqs", "rope_factors"];
    dims.len() == 1 || !name.ends_with(".weight") || steers.iter().any(|part| name.contains(part))
}

/// llama.cpp's `use_more_bits`: the first and last eighth of the layers, and every third between.
fn gets_more_bits(layer: u64, n_layers: u64) -> bool {
    let eighth = n_layers / 8;
    layer < eighth || layer >= 7 * n_layers / 8 || (layer - eighth) % 3 == 2
}

/// `format`, or `floor` where that has more bits a value.
fn at_least(format: Format, floor: Format) -> Format {
    let bits = |format: Format| format.block_bytes() * 256 / format.block_values();
    if bits(format) < bits(floor) { floor } else { format }
}

/// What llama.cpp takes for rows that are not whole blocks.
fn with_smaller_blocks(format: Format) -> Format {
    match format {
        Format::Q4_K => Format::Q5_0,
        Format::Q5_K => Format::Q5_1,
        Format::Q6_K => Format::Q8_0,
        _ => Format::F16,
    }
}

/// True when `pattern` describes the whole of `name`; `*` stands for any run of characters.
pub(super) fn matches(pattern: &str, name: &str) -> bool {
    let Some((head, rest)) = pattern.split_once('*') else { return pattern == name };
    let Some(mut name) = name.strip_prefix(head) else { return false };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let tail = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = name.find(part) else { return false };
        name = &name[at + part.len()..];
    }
    name.ends_with(tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choose(recipe: &str, name: &str, dims: &[u64]) -> Choice {
        let subject = Subject { name, dims, format: Format::F16 };
        Recipe::from_name(recipe).unwrap().choose(&subject, &Whole { n_layers: 32, tied: false, is_folder: false })
    }

    fn check(recipe: &str, name: &str, expected: Format) {
        let found = choose(recipe, name, &[512, 64]);
        assert_eq!(found, Choice { format: expected, instead_of: None }, "{recipe}: {name}");
    }

    #[test]
    fn what_steers_stays_as_it_is() {
        for name in [
            "blk.3.attn_norm.weight",
            "blk.3.ffn_gate_inp.weight",
            "blk.3.exp_probs_b.bias",
            "blk.3.indexer.proj.weight",
            "blk.3.indexer.k_norm.bias",
            "blk.3.attn_q.bias",
        ] {
            check("Q4_0", name, Format::F16);
        }
        assert_eq!(choose("Q4_0", "rope_freqs.weight", &[512]).format, Format::F16);
        let norm = |format, is_folder| {
            let subject = Subject { name: "output_norm.weight", dims: &[512], format };
            let whole = Whole { n_layers: 32, tied: false, is_folder };
            Recipe::from_name("Q4_0").unwrap().choose(&subject, &whole).format
        };
        assert_eq!([norm(Format::BF16, false), norm(Format::F16, true)], [Format::F32; 2], "nothing is lost");
    }

    #[test]
    fn indexer_matrices_never_fall_below_q8_0() {
        for (recipe, format) in [("Q4_0", Format::Q8_0), ("Q4_K_M", Format::Q8_0), ("F16", Format::F16)] {
            check(recipe, "blk.3.indexer.attn_q_b.weight", format);
            check(recipe, "blk.3.indexer.attn_k.weight", format);
        }
    }

    #[test]
    fn mixed_recipes_give_more_bits_where_llama_cpp_does() {
        for (layer, value, latent) in [
            (0, Format::Q6_K, Format::Q6_K),
            (4, Format::Q4_K, Format::Q5_K),
            (5, Format::Q4_K, Format::Q5_K),
            (6, Format::Q6_K, Format::Q6_K),
            (28, Format::Q6_K, Format::Q6_K),
        ] {
            check("Q4_K_M", &format!("blk.{layer}.attn_v.weight"), value);
            check("Q4_K_M", &format!("blk.{layer}.ffn_down_exps.weight"), value);
            check("Q4_K_M", &format!("blk.{layer}.attn_kv_a_mqa.weight"), latent);
            check("Q4_K_M", &format!("blk.{layer}.ffn_up.weight"), Format::Q4_K);
            check("Q4_K", &format!("blk.{layer}.attn_v.weight"), Format::Q4_K);
        }
        check("Q8_0", "blk.0.attn_v.weight", Format::Q8_0);
    }

    #[test]
    fn the_output_keeps_six_bits_and_a_tied_embedding_is_one() {
        check("Q4_0", "output.weight", Format::Q6_K);
        check("Q8_0", "output.weight", Format::Q8_0);
        check("Q4_0", "token_embd.weight", Format::Q4_0);
        let subject = Subject { name: "token_embd.weight", dims: &[512, 64], format: Format::F16 };
        let tied = Whole { n_layers: 32, tied: true, is_folder: false };
        assert_eq!(Recipe::from_name("q4_0").unwrap().choose(&subject, &tied).format, Format::Q6_K);
    }

    #[test]
    fn rows_that_are_not_whole_blocks_take_smaller_ones() {
        for (recipe, row, format, wanted) in [
            ("Q4_K", 576, Format::Q5_0, Format::Q4_K),
            ("Q5_K", 576, Format::Q5_1, Format::Q5_K),
            ("Q6_K", 576, Format::Q8_0, Format::Q6_K),
            ("Q4_K", 40, Format::F16, Format::Q4_K),
            ("Q4_0", 40, Format::F16, Format::Q4_0),
        ] {
            let found = choose(recipe, "blk.9.ffn_up.weight", &[row, 64]);
            assert_eq!(found, Choice { format, instead_of: Some(wanted) }, "{recipe} {row}");
        }
    }

    #[test]
    fn a_star_stands_for_any_run_of_characters() {
        for (pattern, name, expected) in [
            ("token_embd.weight", "token_embd.weight", true),
            ("token_embd", "token_embd.weight", false),
            ("*", "x", true),
            ("blk.0.*", "blk.0.attn_q.weight", true),
            ("blk.0.*", "blk.10.attn_q.weight", false),
            ("*.attn_*.weight", "blk.1.attn_q.weight", true),
            ("*.attn_*.weight", "blk.1.attn_q.bias", false),
            ("*a*a", "aa", true),
            ("*a*a", "a", false),
            ("a*a", "a", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }
}
