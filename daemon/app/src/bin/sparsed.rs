//! `sparsed`: see `sparsed_app::lifecycle`.

fn main() -> std::process::ExitCode {
    sparsed_app::lifecycle::main()
}
