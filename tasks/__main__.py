"""Run a model on a public benchmark, or judge answers that were made elsewhere.

    python -m tasks pope runs/b2 --questions coco_pope_adversarial.json --images val2014 --with-blind
    torchrun --nproc-per-node 8 -m tasks gqa runs/l2-vqa --questions testdev_balanced_questions.json --images gqa/images --short
    python -m tasks spatial runs/b2 --coco annotations/instances_val2017.json --images val2017 --score answers.jsonl

NAME is a benchmark, explained in its file in tasks/, or a task of evaluate.py. formats/eval_folder.py lists the results.
"""

import argparse
import os
from pathlib import Path

import evaluate
from formats import eval_folder
from formats.files import read_json, require_file, run_command, sha256
from formats.journal import join_processes
from formats.parquet import is_parquet
from model import LocVLMConfig
from tasks import TASKS
from tasks.files import Rows
from tasks.words import bare

# the first of these keys that the file has; "answer" comes last, because in Video-ChatGPT's rows it is the truth
ROWS = Rows("rows as in NAME.jsonl", {"id|question_id|questionId": str | int, "pred|text|prediction|answer": str})


def parse(argv):
    files = "\n".join(f"  {name:15} {task.files}" for name, task in TASKS.items())
    style = {"formatter_class": argparse.RawDescriptionHelpFormatter, "epilog": f"the files of each benchmark:\n{files}"}
    parser, own = argparse.ArgumentParser("python -m tasks", description=__doc__, **style), ", ".join(evaluate.TASKS)
    add = parser.add_argument
    add("task", metavar="NAME", choices=(*TASKS, *evaluate.TASKS), help=f"a benchmark: {', '.join(TASKS)}; or one of {own}")
    evaluate.add_options(parser)
    parser.set_defaults(max_new_tokens=None)
    add("--questions", help="a benchmark's file of questions, see below")
    add("--answers", help="its file of answers, if that is another one")
    add("--split", help="for a file that holds several splits")
    add("--short", action="store_true", help="ask for a single word or phrase, as LLaVA-1.5 is asked")
    add("--score", metavar="ROWS", help="judge the answers in this file, rows as in NAME.jsonl or LLaVA's, without images")
    group = parser.add_argument_group("a language model as judge of answers about clips")
    add, either = group.add_argument, group.add_mutually_exclusive_group().add_argument
    either("--judgements", help="its replies to NAME.requests.jsonl: JSON lines with custom_id and response")
    either("--judge-url", help="ask it: https://host/v1, with the key in OPENAI_API_KEY")
    add("--judge-model", default="gpt-3.5-turbo", help="its name (default: gpt-3.5-turbo, the paper's)")
    args = parser.parse_args(argv)
    name, task = args.task, TASKS.get(args.task)
    if task and is_parquet(args.questions or "") and not args.score:
        args.images = args.images or args.questions  # which holds them
    takes = ["questions", *task.options] if task else ["coco"]
    takes += ["answers"] * bool(task and "answers:" in task.files) + ["judgements", "judge_url"] * bool(task and task.after)
    others = [o for o in ("coco", "questions", "answers", "split", "short", "judgements", "judge_url") if o not in takes]
    evaluate.check_options(parser, args, [
        (args.score and int(os.environ.get("WORLD_SIZE", 1)) > 1, "--score runs in one process only"),
        (args.score and (args.blind or args.with_blind), "--score asks no model; leave out --blind and --with-blind"),
        (args.judgements and args.with_blind, "--judgements are about one run; leave out --with-blind"),
        *((getattr(args, o), f"{name} takes --{', --'.join(takes)}, but not --{o}".replace("_", "-")) for o in others),
        (task and not args.questions, f"{name} needs --questions FILE ({task and task.files})"),
        (task and not (args.images or args.score), f"{name} needs --images, the folder or zip of its images or clips"),
    ])
    args.max_new_tokens = args.max_new_tokens or (None if task and task.after else 64)
    return args


def read_answers(path, items):
    """Read answers from a file: pairs (id, answer). Unknown ids are counted; a question of another text raises ValueError."""
    rows, asked = ROWS.read(path), {item.id: item.question for item in items}
    id_key, answer_key = ROWS.keys_in(rows.values())
    print(f"{path}: answers are read from {answer_key!r}, ids from {id_key!r}")
    if surplus := len(rows.keys() - asked.keys()):
        print(f"  {surplus} answers are to questions that are not asked; they do not count")
    for name, row in rows.items():
        theirs = row.get("question", row.get("prompt"))
        if name in asked and isinstance(theirs, str) and plain(theirs) != plain(asked[name]):
            problem = f"the question of {name} is {theirs[:200]!r}, not {asked[name][:200]!r}"
            raise ValueError(f"{path}: {problem}; pass the file (and --seed) whose questions were answered")
    pairs = [(name, row[answer_key]) for name, row in rows.items() if name in asked]
    if pairs and all(plain(answer) == plain(asked[name]) for name, answer in pairs):
        raise ValueError(f"{path}: its {answer_key!r} holds the questions; name the answers \"pred\"")
    return pairs


def plain(question):
    """Return a question without what is around it in LLaVA's files."""
    return " ".join(bare(question.replace("<image>", "")).split())


def score(args, job, wording, about):
    """Judge answers in a file. A run's own rows stay its results; answers made elsewhere go to a folder beside them."""
    is_local = Path(args.run).parent.exists() or args.run.startswith("runs/")  # else it is ORG/NAME on the hub
    into = args.into or (Path(args.run) / "eval" if is_local else None)
    path, folders = Path(args.score), eval_folder.folders_of(args.run, into)
    eval_folder.join(job.items, read_answers(path, job.items), path)
    folder, about = folders["scored"], about | {"scored": {"file": str(path), "sha256": sha256(path)}}
    own = [f for f in folders.values() if (f / f"{job.name}.jsonl").resolve() == path.resolve()]
    before = read_json(path.with_suffix(".json")) if own and path.with_suffix(".json").is_file() else {}
    if args.images and eval_folder.hashes(job.items).items() <= before.items():
        folder, about = own[0], before | {key: about[key] for key in ("git_commit", "torch")}
    if not args.fresh:
        eval_folder.require_own(job, folder, about["data_sha256"])
    eval_folder.write_results(job, job.items, folder, wording, about, args)
    eval_folder.print_table(job, {title: f for title, f in folders.items() if title != "scored" or f == folder})
    if folder != folders["scored"] and not args.into:
        evaluate.write_page(args.run)


def main(argv=None):
    args = parse(argv)
    task = TASKS.get(args.task) or evaluate.TASKS[args.task]
    if args.judgements:
        require_file(args.judgements, "the judge's replies")
    rank, world, wait = processes = join_processes()
    answerer = None if args.score and not (Path(args.run) / "config.json").is_file() else evaluate.Answerer(args, world)
    config = answerer.config if answerer else LocVLMConfig()
    if answerer and not args.max_new_tokens:  # judged answers may be long; half of the context is the question's
        answerer.decoding["max_new_tokens"] = min(1024, config.text_config.max_position_embeddings // 2)
    if not answerer:
        print(f"{args.run} holds no model: boxes are read as {config.coord_format()}")
    wording = evaluate.wording_of(args, config)
    if rank > 0:
        wait()  # until rank 0 has written the shapes world, if it is missing
    if not task.files and args.is_default_data:
        evaluate.use_default_data(args, config)
    [job] = eval_folder.read_jobs({args.task: task}, args, wording)
    first = set(list(dict.fromkeys(item.image for item in job.items))[: args.limit])  # the first images
    job.items = [item for item in job.items if item.image in first]
    if rank == 0:
        wait()  # the others may read it now
    if args.score:
        return score(args, job, wording, eval_folder.describe(args, config, wording, [job]))
    eval_folder.run_jobs(args, [job], wording, answerer, processes)
    if rank == 0 and not args.into:
        evaluate.write_page(args.run)


if __name__ == "__main__":
    run_command("python -m tasks", main, "--into")
