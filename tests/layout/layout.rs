//! The header, its Rust mirror and the committed snapshot agree on every size and offset, in C11 and in C++17.
//! After a wanted change: `SPARSED_BLESS=1 cargo test --release --test layout` rewrites the snapshot.
#![allow(clippy::unwrap_used, missing_docs, reason = "a test")]

use sparsed_abi::layouts;
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
    if std::env::var_os("SPARSED_BLESS").is_some() {
        std::fs::write(path, mirror()).unwrap();
    }
    let committed = std::fs::read_to_string(path).unwrap_or_default();
    assert_eq!(committed, mirror(), "the layout changed: append only, raise SPD_ABI_MINOR, and bless the snapshot");
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
    same!(DT_Q8_0 DT_Q2_K DT_Q3_K DT_Q4_K DT_Q5_K DT_Q6_K DT_IQ4_NL DT_IQ4_XS DT_I8 DT_I32 DT_I64 DT_BF16 DT_MXFP4);
    same!(DT_U32 DT_F8E4M3 DT_F8E4M3_B128 T_ACTIVATION T_INPUT T_OUTPUT T_WEIGHT T_VIEW);
    same!(DIM_TOKENS DIM_SEQS DIM_LOGITS);
    same!(OP_EMBED OP_RMS_NORM OP_LAYER_NORM OP_LINEAR OP_ROPE OP_MLA_ABSORB OP_MLA_EXPAND OP_KV_APPEND OP_IDX_APPEND);
    same!(OP_IDX_TOPK OP_SPARSE_MLA OP_DENSE_MLA OP_MOE_ROUTE OP_MOE_LINEAR OP_MOE_COMBINE OP_SILU_MUL OP_ADD);
    same!(OP_GATHER_ROWS OP_HADAMARD KV_COPY KV_EXPORT KV_IMPORT KV_DISCARD W_HOST_IN_PLACE);
}
