//! The header, its Rust mirror and the committed snapshot agree on every size, offset and number, in C11 and in C++17.
//! After a wanted change: `SPARSED_BLESS=1 cargo test --release --test layout` rewrites the snapshot. The snapshot of
//! the first minor is frozen: whatever is blessed, all of it is still there.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_abi::layouts;
use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// The mirror's view, a line a struct and a line a field. `input` and `inputs` are `in` in C.
fn mirror() -> String {
    let mut text = String::new();
    for layout in layouts() {
        writeln!(text, "{} {}", layout.name, layout.size).unwrap();
        for field in layout.fields {
            writeln!(text, "  {} {} {}", c_name(field.name), field.offset, field.size).unwrap();
        }
    }
    writeln!(text, "digest {:x}", sparsed_abi::LAYOUT_DIGEST).unwrap();
    text
}

fn c_name(field: &str) -> &str {
    match field {
        "input" | "inputs" => "in",
        "outputs" => "out",
        other => other,
    }
}

/// The numbers that the header defines, by name, as a compiler sees them.
fn constants() -> String {
    let header = std::fs::read_to_string(sparsed_tests::root().join("abi/include/sparsed/plugin.h")).unwrap();
    let mut source = String::from("#include <sparsed/plugin.h>\n#include <stdio.h>\nint main(void) {\n");
    let mut n = 0;
    for line in header.lines() {
        let mut words = line.split_whitespace();
        let (Some("#define"), Some(name), Some(value)) = (words.next(), words.next(), words.next()) else { continue };
        let is_number = value.starts_with(|c: char| c.is_ascii_digit() || c == '(' || c == '-');
        if name.starts_with("SPD_") && is_number && !name.contains('(') {
            writeln!(source, "printf(\"constant {name} %lld\\n\", (long long){name});").unwrap();
            n += 1;
        }
    }
    assert!(n > 90, "only {n} numbers were found");
    source.push_str("return 0; }\n");
    run("cc", "-std=c11", "c", &source)
}

/// A compiler's view of the header. Includes the headers that check what crosses the border, so that they are compiled.
fn compiled(compiler: &str, standard: &str, extension: &str) -> String {
    let mut source = String::from(
        "#include <sparsed/plugin.h>\n#include <sparsed/program.h>\n#include <stdio.h>\nint main(void) {\n",
    );
    for layout in layouts() {
        let name = layout.name;
        writeln!(source, "printf(\"{name} %zu\\n\", sizeof({name}));").unwrap();
        for field in layout.fields.iter().map(|field| c_name(field.name)) {
            writeln!(
                source,
                "printf(\"  {field} %zu %zu\\n\", offsetof({name}, {field}), sizeof((({name} *)0)->{field}));"
            )
            .unwrap();
        }
    }
    source.push_str("printf(\"digest %llx\\n\", (unsigned long long)SPD_LAYOUT);\nreturn 0; }\n");
    run(compiler, standard, extension, &source)
}

/// What a program prints.
fn run(compiler: &str, standard: &str, extension: &str, source: &str) -> String {
    let dir = tempfile::tempdir().unwrap();
    let (file, program) = (dir.path().join(format!("layout.{extension}")), dir.path().join("layout"));
    std::fs::write(&file, source).unwrap();
    let include = sparsed_tests::root().join("abi/include");
    let built = Command::new(compiler)
        .args([standard, "-Wall", "-Wextra", "-pedantic", "-Werror", "-I"])
        .arg(include)
        .arg("-o")
        .arg(&program)
        .arg(&file)
        .output()
        .unwrap();
    assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
    String::from_utf8(Command::new(program).output().unwrap().stdout).unwrap()
}

#[test]
fn the_mirror_is_what_c11_sees() {
    assert_eq!(compiled("cc", "-std=c11", "c"), mirror());
}

#[test]
fn the_mirror_is_what_cpp17_sees() {
    assert_eq!(compiled("c++", "-std=c++17", "cpp"), mirror());
}

#[test]
fn the_layout_is_the_committed_one() {
    let path: &Path = &sparsed_tests::root().join("abi/layout.txt");
    let now = mirror() + &constants();
    if std::env::var_os("SPARSED_BLESS").is_some() {
        std::fs::write(path, &now).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(committed, now, "the layout changed: append only, raise SPD_ABI_MINOR, and bless the snapshot");
}

/// A snapshot's entries: a struct's size, a field's place, a number's value.
fn entries(snapshot: &str) -> BTreeMap<String, String> {
    let mut of = String::new();
    let entry = |line: &str| {
        let (name, value) = if let Some(number) = line.strip_prefix("constant ") {
            number.split_once(' ').unwrap()
        } else if let Some(field) = line.strip_prefix("  ") {
            let (field, place) = field.split_once(' ').unwrap();
            return (format!("{of}.{field}"), place.to_owned());
        } else {
            line.split_once(' ').unwrap()
        };
        name.clone_into(&mut of);
        (name.to_owned(), value.to_owned())
    };
    snapshot.lines().map(entry).collect()
}

/// What is in `old` and is not in `new`, or is something else there. Structs, and the minor, may have grown.
fn lost(old: &str, new: &str) -> Vec<String> {
    let (old, new) = (entries(old), entries(new));
    let grows = |name: &str| name == "SPD_ABI_MINOR" || name.starts_with("spd_") && !name.contains('.');
    let kept = |name: &str, was: &str, is: &str| {
        was == is || grows(name) && is.parse::<u64>().unwrap() >= was.parse::<u64>().unwrap()
    };
    let missing = |(name, was): &(&String, &String)| !new.get(*name).is_some_and(|is| kept(name, was, is));
    old.iter().filter(missing).map(|(name, was)| format!("{name} {was}")).collect()
}

#[test]
fn everything_of_the_frozen_minor_is_where_it_was() {
    let frozen = std::fs::read_to_string(sparsed_tests::root().join("tests/layout/0.2/layout.txt")).unwrap();
    assert_eq!(lost(&frozen, &(mirror() + &constants())), Vec::<String>::new());
}

#[test]
fn a_moved_field_a_smaller_struct_and_a_changed_number_are_noticed_and_what_is_appended_is_not() {
    let old = "spd_a 16\n  x 0 8\n  y 8 8\ndigest 1f\nconstant SPD_ABI_MINOR 2\nconstant SPD_K 3\n";
    let grown = "spd_a 24\n  x 0 8\n  y 8 8\n  z 16 8\ndigest 1f\nconstant SPD_ABI_MINOR 3\nconstant SPD_K 3\n";
    assert_eq!(lost(old, &(grown.to_owned() + "constant SPD_NEW 9\n")), Vec::<String>::new());
    for (from, to) in [("y 8 8", "y 16 8"), ("SPD_K 3", "SPD_K 4"), ("spd_a 24", "spd_a 8"), ("digest 1f", "digest 2f")]
    {
        assert_eq!(lost(old, &grown.replace(from, to)).len(), 1, "{to}");
    }
}

#[test]
fn constants_have_the_headers_values() {
    let header = std::fs::read_to_string(sparsed_tests::root().join("abi/include/sparsed/plugin.h")).unwrap();
    let value = |name: &str| {
        let line = header.lines().find(|line| line.split_whitespace().nth(1) == Some(name));
        let text =
            line.and_then(|line| line.split_whitespace().nth(2)).unwrap_or_else(|| panic!("{name} is not there"));
        text.trim_matches(|c| c == '(' || c == ')').trim_end_matches('u').parse::<i64>().unwrap()
    };
    macro_rules! same {
        ($($name:ident)*) => { $(assert_eq!(value(concat!("SPD_", stringify!($name))), i64::from(sparsed_abi::$name));)* };
    }
    same!(ABI_MAJOR ABI_MINOR E_INVALID E_UNSUPPORTED E_ABI E_NOMEM_DEVICE E_NOMEM_HOST E_BUSY E_CANCELLED E_TIMEOUT);
    same!(E_DATA E_DRIVER E_STEP E_QUEUE_LOST E_DEVICE_LOST E_INTERNAL DT_F32 DT_F16 DT_Q4_0 DT_Q4_1 DT_Q5_0 DT_Q5_1);
    same!(DT_Q8_0 DT_Q2_K DT_Q3_K DT_Q4_K DT_Q5_K DT_Q6_K DT_IQ4_NL DT_IQ4_XS DT_I32 DT_BF16 DT_MXFP4);
    same!(DT_F8E4M3 DT_W16 DT_F8_128 DT_Q6_0 T_ACTIVATION T_INPUT T_OUTPUT T_WEIGHT T_VIEW);
    same!(DIM_TOKENS DIM_SEQS DIM_LOGITS);
    same!(OP_EMBED OP_RMS_NORM OP_LAYER_NORM OP_LINEAR OP_ROPE OP_MLA_ABSORB OP_MLA_EXPAND OP_KV_APPEND OP_IDX_APPEND);
    same!(OP_IDX_TOPK OP_SPARSE_MLA OP_DENSE_MLA OP_MOE_ROUTE OP_MOE_LINEAR OP_MOE_COMBINE OP_SILU_MUL OP_ADD);
    same!(OP_GATHER_ROWS OP_HADAMARD KV_COPY KV_EXPORT KV_IMPORT KV_DISCARD W_HOST_IN_PLACE);
    same!(SLOW_AES_256_GCM SLOW_CHACHA20_POLY1305);
}
