//! `sparsectl`: see `sparsed_app::ctl`.

fn main() -> std::process::ExitCode {
    sparsed_app::ctl::main()
}
