//! What was typed. What it means, together with the configuration file and the environment, is said by `config`.

use std::ffi::OsString;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};

use super::error::{CliError, Exit};
use super::global::Global;
use super::{
    Context, ask, bench, blocks, capture, completions, demo, encode, eval, index, ls, model, repair, rm, serve, show,
    stats, train, verify,
};

const EXAMPLES: &str = "\
Examples:
  landmarkdb ls                                  what the data directory holds
  landmarkdb serve --data ./books                serve a data directory on 127.0.0.1:7601
  landmarkdb ls --connect http://127.0.0.1:7601  the same question, asked of the service
  landmarkdb verify                              read everything and check it
";

/// The block memory of language models: landmark keys in an index, KV blocks on disk.
///
/// Commands on documents work on a data directory (--data) or on a running service (--connect). serve and repair need a data
/// directory; eval, bench and capture work in a temporary one unless told otherwise, demo always; model, train and completions
/// need none. Settings come from the configuration file, then from LANDMARKDB__SECTION__KEY variables, then from flags; the
/// later one wins.
#[derive(Debug, Parser)]
#[command(name = "landmarkdb", version, arg_required_else_help = true)]
#[command(after_help = EXAMPLES, after_long_help = format!("{EXAMPLES}\n{}", Exit::help()))]
pub(super) struct Cli {
    #[command(flatten)]
    pub(super) global: Global,
    #[command(subcommand)]
    pub(super) command: Command,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Demo(demo::Args),
    Serve(serve::Args),
    #[command(subcommand)]
    Model(model::Command),
    Encode(encode::Args),
    Ask(ask::Args),
    Ls(ls::Args),
    Show(show::Args),
    Blocks(blocks::Args),
    Stats(stats::Args),
    Verify(verify::Args),
    Repair(repair::Args),
    Rm(rm::Args),
    #[command(subcommand)]
    Eval(eval::Command),
    #[command(subcommand)]
    Bench(bench::Command),
    Capture(capture::Args),
    #[command(subcommand)]
    Index(index::Command),
    Train(train::Args),
    Completions(completions::Args),
}

impl Cli {
    /// What was typed, program name first.
    pub(super) fn read(typed: &[OsString]) -> Result<Cli, clap::Error> {
        let mut command = with_negative_numbers(Cli::command());
        let is_help = typed.get(1).is_some_and(|word| word == "help");
        // Help of `help` is help.
        let words = typed.iter().filter(|word| !is_help || !["-h", "--help"].iter().any(|flag| word == flag));
        let mut matches = command.try_get_matches_from_mut(words)?;
        Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command))
    }
}

/// Lets `-1` be the value of a flag: its range says more than that there is no flag `-1`.
fn with_negative_numbers(command: clap::Command) -> clap::Command {
    let takes = |arg: &clap::Arg| !arg.is_positional() && arg.get_action().takes_values();
    let command = command.mut_args(|arg| if takes(&arg) { arg.allow_negative_numbers(true) } else { arg });
    command.mut_subcommands(with_negative_numbers)
}

impl Command {
    /// Whether it changes the memory that it works on. What measures makes its own, unless it is told where.
    fn writes(&self, context: &Context) -> bool {
        match self {
            Command::Encode(_) | Command::Rm(_) | Command::Repair(_) | Command::Index(_) => true,
            Command::Eval(_) | Command::Bench(_) | Command::Capture(_) => context.config.target_typed,
            _ => false,
        }
    }

    pub(super) fn run(self, context: &Context) -> Result<(), CliError> {
        if context.config.read_only && self.writes(context) {
            return Err(CliError::ReadOnly);
        }
        match self {
            Command::Demo(args) => demo::run(&args, context),
            Command::Encode(args) => encode::run(&args, context),
            Command::Ask(args) => ask::run(&args, context),
            Command::Eval(command) => eval::run(&command, context),
            Command::Bench(command) => bench::run(&command, context),
            Command::Capture(args) => capture::run(&args, context),
            Command::Index(command) => index::run(&command, context),
            Command::Train(args) => train::run(&args, context),
            Command::Serve(args) => serve::run(&args, context),
            Command::Model(command) => model::run(&command, context),
            Command::Ls(args) => ls::run(&args, context),
            Command::Show(args) => show::run(&args, context),
            Command::Blocks(args) => blocks::run(&args, context),
            Command::Stats(args) => stats::run(&args, context),
            Command::Verify(args) => verify::run(&args, context),
            Command::Repair(args) => repair::run(&args, context),
            Command::Rm(args) => rm::run(&args, context),
            Command::Completions(args) => completions::run(&args, &mut Cli::command()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_table_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_an_example_and_explains_its_flags() {
        fn check(command: &clap::Command, path: &str) {
            if command.has_subcommands() {
                command.get_subcommands().for_each(|sub| check(sub, &format!("{path} {}", sub.get_name())));
            } else {
                let help = command.get_after_help().map(|help| help.to_string()).unwrap_or_default();
                assert!(help.contains(path), "the after_help of `{path}` has no example of it: {help:?}");
                assert!(command.get_about().is_some(), "{path} does not say what it does");
                for flag in command.get_arguments() {
                    assert!(flag.get_help().is_some(), "{path}: {} does not say what it does", flag.get_id());
                }
            }
        }
        check(&Cli::command(), "landmarkdb");
    }

    /// A command of the page, typed in the folder of the captured file, measures what the page says.
    #[test]
    fn what_a_bench_report_shows_can_be_typed() {
        let report = |captured: &str, python: &str, more: &[&str]| {
            let typed = ["landmarkdb", "bench", "report", "--captured", captured, "--python", python];
            let cli = Cli::try_parse_from(typed.iter().chain(more)).unwrap();
            let Command::Bench(bench::Command::Report(args)) = cli.command else { panic!("another command") };
            args.commands()
        };
        for more in [&["--model", "m.gguf"][..], &["--quick"]] {
            let commands = report("c.safetensors", "python3", more);
            for (line, meant) in &commands {
                let typed = Cli::try_parse_from(line.split(' ')).unwrap().command;
                assert_eq!(format!("{typed:?}"), *meant, "{line}");
            }
            let elsewhere = report("folder/c.safetensors", "folder/python", more);
            for ((line, _), (shown, _)) in commands.iter().zip(&elsewhere) {
                assert_eq!(line, shown, "the page says nothing of this machine's folders");
            }
        }
    }

    #[test]
    fn global_flags_may_follow_the_command() {
        let cli = Cli::try_parse_from(["landmarkdb", "--json", "ls", "--data", "d", "--collection", "books", "-vv"]);
        let global = cli.unwrap().global;
        assert!(global.json);
        assert_eq!(global.data, Some("d".into()));
        assert_eq!(global.collection.as_deref(), Some("books"));
        assert_eq!(global.verbose, 2);
    }
}
