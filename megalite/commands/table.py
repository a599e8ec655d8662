"""Every command of `megalite`, one row each. To add one, add a row: help, completion and suggestions use it.

A program is `main(arguments) -> exit code`, and its module is imported only when the command runs.
"""

from typing import NamedTuple


class Command(NamedTuple):
    """name: as typed. phrase: for the list of commands. module, function: the program's main. resumes: whether the same
    command resumes an interrupted run."""

    name: str
    phrase: str
    module: str
    function: str = "main"
    resumes: bool = False


COMMANDS = (
    Command(
        "pretrain",
        "train a model: from a JSON config, or straight from a text file",
        "megalite.commands.pretrain",
        resumes=True,
    ),
    Command(
        "run",
        "start a command on several ranks with deepspeed, and restart it after failures",
        "megalite.supervisor.restarts",
        resumes=True,
    ),
    Command(
        "generate",
        "continue prompts with a trained model",
        "megalite.inference.generate_program",
        "generate_main",
    ),
    Command("chat", "talk to a model that has a chat template", "megalite.commands.chat"),
    Command(
        "evaluate",
        "measure a model: loss on a corpus, accuracy, lm-eval tasks",
        "megalite.inference.evaluate_program",
        "evaluate_main",
    ),
    Command(
        "report",
        "show runs as one page: curves, samples, memory, the pipeline",
        "megalite.report.report_program",
    ),
    Command(
        "plan",
        "find the fastest layout for a model and a number of ranks",
        "megalite.plan.plan_program",
    ),
    Command(
        "dry-run",
        "try a run of many ranks in one process, without a GPU",
        "megalite.prove.dry_run_program",
    ),
    Command(
        "train-tokenizer", "train a tokenizer on text files", "megalite.commands.train_tokenizer"
    ),
    Command(
        "preprocess",
        "tokenize text files into a corpus",
        "megalite.commands.preprocess",
        resumes=True,
    ),
    Command(
        "inspect-data",
        "show and check corpora and blends of them",
        "megalite.commands.inspect_data",
    ),
    Command(
        "import", "convert a Hugging Face folder to a checkpoint", "megalite.commands.import_hf"
    ),
    Command(
        "export", "convert a checkpoint to a Hugging Face folder", "megalite.commands.export_hf"
    ),
    Command(
        "inspect-checkpoint",
        "show and check what a checkpoint holds",
        "megalite.commands.inspect_checkpoint",
    ),
    Command(
        "config",
        "explain a config key, or print the JSON schema for editors",
        "megalite.commands.config",
    ),
    Command(
        "configs",
        "list the example configs, or copy one to start from",
        "megalite.commands.configs",
    ),
    Command(
        "verify-layouts",
        "prove on your own config that layouts train the same",
        "megalite.prove.verify",
    ),
    Command("doctor", "check the hosts of a run before it starts", "megalite.doctor.examine"),
    Command("completion", "print the completion script of a shell", "megalite.commands.completion"),
)
