//! `sheave-cni`: the plugin as container runtimes start it. Everything is in the library.

fn main() -> std::process::ExitCode {
    sheave_cni::plugin::run()
}
