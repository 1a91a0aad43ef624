"""This code beside `transformers`, in one run: a training step, loading and generation, and evaluation.

    pip install transformers
    python bench.py                   training: a 63 M-parameter stand-in, 6 questions on each of 4 images; some minutes, 10 GB
    python bench.py generate          loading and generation: a LLaMA of SmolLM2-135M's shape, or --llama FOLDER; some minutes
    python bench.py evaluate          evaluation: 6 questions on each of 4 images at ViT-L/14's 336 px, or --run RUN; some minutes

Training. Both sides learn the same: the same random weights, images, questions and answers (App. B, "v1" template), in fp32; the
vision tower is frozen, projector and LLaMA learn. A step is forward, backward and fused AdamW.

    ours     LocVLM.forward: B rows, each with its image once and k question/answer segments behind it (data.pack)
    theirs   LlavaForConditionalGeneration, fused attention (its default), no cache: k * B right-padded rows with an attention mask,
             each with its image

Each measurement is a process of its own, so that its peak memory is its own: once with glibc's allocator told to keep
freed memory (train.keep_freed_memory), once as it comes, on both sides alike. The first step, which also allocates
AdamW's moments, counts for memory and not for time. Its loss must agree to four decimals. Linux only (/proc).

Generation. Both sides load the same folder in fp32, read a prompt, and continue it in greedy, one row and eight. Ours three
times: as `for_inference()` leaves it, compiled, and with bf16 weights. A token must move every weight but the embeddings:
"of limit" is the time of reading as many bytes in one sum, as a share of what a token of one row took.

Evaluation. Batches of images are answered in greedy as evaluate.py has them answered, k questions behind each image
(LocVLM.generate), and by `transformers` with a row for each question and its image in each row: as many rows at a time as
our batch holds questions, and as it holds images. The same weights in one process, fp32, the three in turn for every batch,
after one question that does not count. Pixels are ready: neither side opens images. The model is a LLaVA of random weights
(ViT-L/14 at 336 px before a LLaMA of SmolLM2-135M's shape) that never ends an answer early, or --run, asked the questions of
benchmarks.py about held-out shapes. Where answers differ, so does one token first: the gap of its logits is printed.
"""

import argparse
import random
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from clip_vit import CLIPVisionConfig, preprocess
from coords import CoordFormat
from data import (
    IMAGE_ID,
    LOC_ANSWER,
    Wording,
    collate,
    encode_prefix,
    encode_question,
    encode_segment,
    loc_question,
    pack,
)
from evaluate import TASKS
from formats.annotations import read_file
from formats.files import write_json
from formats.images import open_image
from formats.weights import write_tensors
from llama import Llama, LlamaConfig
from model import LocVLM, LocVLMConfig
from tiny.shapes import ensure_world
from train import keep_freed_memory

VISION = CLIPVisionConfig(256, 1024, 6, 4, image_size=224)  # 256 patches, as ViT-L/14 at 224 px
VIT_L = CLIPVisionConfig(image_size=336)
SMOLLM2 = {  # config.json of SmolLM2-135M
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
NAMES = ("dog", "cup", "traffic light", "orange", "dining table", "person", "bicycle", "laptop")


class StandInTokenizer:
    """Words and single characters -> ids in order of appearance: about as many as LLaMA's pieces, which are not in this project."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        pieces = re.findall(
            r"[A-Za-z]+| (?=\d)|\S|\n", text
        )  # LLaMA too gives a digit, and the space before it, a piece each
        return [self.ids.setdefault(piece, 3 + len(self.ids)) for piece in pieces]

    def decode(self, ids):
        return " ".join(map(str, ids))


def model_config(args):
    """The stand-in; `transformers` has only the adapter of two layers."""
    width = args.hidden_size
    intermediate = -(-width * 8 // 3 // 32) * 32  # LLaMA's 8/3, to a multiple of 32
    return LocVLMConfig(
        VISION, LlamaConfig(args.vocab_size, width, intermediate, args.layers, width // 64), "mlp2x_gelu"
    )


def make_batch(args, packed):
    """The questions as our model takes them (data.collate): k to a row, or each in a row of its own with its image again."""
    rng, tokenizer, wording = random.Random(0), StandInTokenizer(), Wording(CoordFormat("ivb", VISION.image_size))

    def segment():
        box_px = (
            rng.randrange(140),
            rng.randrange(105),
            rng.randrange(140, 280),
            rng.randrange(105, 210),
        )  # bins of two digits
        answer = LOC_ANSWER.format(loc=wording.place(box_px, (640, 480)))
        return encode_segment(tokenizer, "v1", [(loc_question(rng.choice(NAMES), wording, rng), answer)])

    prefix = encode_prefix(tokenizer, "v1", VISION.num_patches)
    segments = [[segment() for _ in range(args.questions)] for _ in range(args.images)]
    images = torch.randn(
        args.images, 3, VISION.image_size, VISION.image_size, generator=torch.Generator().manual_seed(1)
    )
    if not packed:
        segments = [[one] for of_image in segments for one in of_image]
        images = images.repeat_interleave(args.questions, dim=0)
    rows = [pack(prefix, of_row, LlamaConfig.max_position_embeddings) for of_row in segments]
    return {**collate(rows), "pixel_values": images}


def build_ours(args):
    """Our model's parameters by name, the call that gives the loss, and (rows, tokens) of its batch."""
    model, batch = LocVLM(model_config(args)), make_batch(args, packed=True)
    return dict(model.named_parameters()), lambda: model(**batch), tuple(batch["input_ids"].shape)


def build_theirs(args):
    """The same of `transformers`' Llava, its parameters under our names."""
    model, batch = their_llava(model_config(args)), make_batch(args, packed=False)
    inputs = {
        "input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_ID, args.vocab_size - 1),
        "labels": batch["labels"],
        "attention_mask": (batch["segments"] >= 0).long(),
        "pixel_values": batch["pixel_values"],
    }
    named = {our_name(name): p for name, p in model.named_parameters()}
    return named, lambda: model(**inputs, use_cache=False).loss, tuple(inputs["input_ids"].shape)


def their_llava(config):
    """`transformers`' Llava of our config; its image placeholder, which must be a word, is the last one."""
    try:
        from transformers import LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise ImportError(
            f"transformers is not here ({error}); bench.py compares with it; run `pip install transformers`"
        ) from None
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config={"model_type": "clip_vision_model", **vars(config.vision_config)},
            text_config={"model_type": "llama", **vars(config.text_config)},
            image_token_index=config.text_config.vocab_size - 1,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            projector_hidden_act="gelu",
        )
    )


def our_name(name):
    """A parameter of `transformers`' Llava -> what it is called in LocVLM."""
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")  # older versions
    return name.replace("multi_modal_projector.", "adapter.").replace("lm_head.", "language_model.lm_head.")


def draw_weights(named):
    """Draw every weight anew, in the order of our names: both sides get the same, and no second copy is ever in memory."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(named.items()):
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data.copy_(noise * p[0].numel() ** -0.5)
        else:
            p.data.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))


def memory(key):
    """This process' memory in GiB: `VmRSS` now, `VmHWM` at its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":")) / 2**20


def in_own_process(call, *args):
    """Call in a new process, so that memory and allocator are its own, and give the result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(call, *args).result()


def measure(side, tuned, args):
    """Train one side for some steps, in this process."""
    if tuned:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    named, loss_of_batch, shape = {"ours": build_ours, "theirs": build_theirs}[side](args)
    draw_weights(named)
    for name, p in named.items():
        p.requires_grad_(not name.startswith("vision_tower."))
    optimizer = torch.optim.AdamW([p for p in named.values() if p.requires_grad], lr=2e-5, fused=True)
    before = memory("VmRSS")
    losses, seconds = [], []
    for _ in range(1 + args.steps):
        began = time.perf_counter()
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    return {
        "shape": shape,
        "parameters": sum(p.numel() for p in named.values()),
        "losses": losses,
        "seconds": statistics.median(seconds[1:]),
        "peak": memory("VmHWM"),
        "growth": memory("VmHWM") - before,
    }


# ----- loading and generation


def write_llama(folder):
    """A random LLaMA of SmolLM2-135M's shape, as a HF folder."""
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **SMOLLM2})
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_dict(SMOLLM2))
    named = {f"model.{k}": torch.empty(v.shape) for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    draw_weights(named)
    write_tensors(folder / "model.safetensors", named)


def clock(call, times=3):
    """Median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


@torch.inference_mode()
def measure_generation(side, folder, args):
    """Load a folder and generate, in this process: seconds, GiB, and the ids of one answer."""
    torch.set_num_threads(args.threads)
    if side == "theirs":
        from transformers import LlamaForCausalLM
    before, began = memory("VmHWM"), time.perf_counter()
    if side == "theirs":
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    else:
        model = Llama.from_pretrained(folder, torch.bfloat16 if side == "bf16" else torch.float32)
    found = {"load": time.perf_counter() - began, "peak": memory("VmHWM") - before}
    found["tensors"] = sum(p.nbytes for p in model.parameters()) / 2**30
    # every weight moves for a token, but of the embeddings one row (a tied head moves all of it)
    untied = 0 if model.lm_head.weight is (model.model if side == "theirs" else model).embed_tokens.weight else 1
    moved = sum(p.nbytes for p in model.parameters()) - untied * model.lm_head.weight.nbytes
    if side != "theirs":
        model.for_inference(compile=side == "compiled")

    def answer(prompts, count):
        """Greedy ids that continue prompts of one length."""
        if side != "theirs":
            return model.generate(prompts, count)
        ids = torch.tensor(prompts)
        fixed = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
        return model.generate(ids, attention_mask=torch.ones_like(ids), **fixed)[:, ids.shape[1] :].tolist()

    draw = random.Random(0)
    prompts = [[draw.randrange(3, 400) for _ in range(32)] for _ in range(8)]
    long = [draw.randrange(3, 400) for _ in range(600)]  # about an image at 336 px and the words before it
    found["answer"] = answer(prompts[:1], 16)[0]
    found["prefill"] = clock(lambda: answer([long], 1))
    for rows in (1, 8):
        short, long = (clock(lambda n=n, rows=rows: answer(prompts[:rows], n)) for n in (1, 1 + args.tokens))
        found[rows] = (long - short) / args.tokens
    block = torch.ones(moved // 4)
    found["limit"] = clock(block.sum, times=9)
    return found


def generation(args):
    """Print both sides' loading and generation, and the ratios."""
    with TemporaryDirectory() as made:
        folder = Path(args.llama or made)
        if not args.llama:
            write_llama(folder)
        print(f"{folder}: fp32, {args.threads} threads")
        print("side      load s  peak/tensors  prefill 600  tokens/s, 1 row  of limit  tokens/s, 8 rows")
        results = {}
        for side in ("theirs", "ours", "compiled", "bf16"):
            r = results[side] = in_own_process(measure_generation, side, folder, args)
            print(
                f"{side:8}  {r['load']:6.2f}  {r['peak'] / r['tensors']:12.2f}  {r['prefill']:11.2f}  {1 / r[1]:15.1f}  "
                f"{r['limit'] / r[1]:8.0%}  {8 / r[8]:16.1f}",
                flush=True,
            )
    theirs = results.pop("theirs")
    for side, r in results.items():
        assert side == "bf16" or r["answer"] == theirs["answer"], f"{side}: another answer than transformers'"
        print(
            f"{side}: {theirs['load'] / r['load']:.1f} x as fast to load, {theirs['prefill'] / r['prefill']:.1f} x prefill, "
            f"{theirs[1] / r[1]:.1f} x one row (goal: 2), {theirs[8] / r[8]:.1f} x eight rows (goal: 2)"
        )


# ----- evaluation


def stand_in(args):
    """Ours and theirs of the same random weights, and what is asked: a list of (pixels (3, S, S), questions)."""
    config, tokenizer = LocVLMConfig(VIT_L, LlamaConfig.from_dict(SMOLLM2), "mlp2x_gelu"), StandInTokenizer()
    theirs, ours = their_llava(config).eval(), LocVLM(config).eval()
    named = {our_name(name): p for name, p in theirs.named_parameters()}
    draw_weights(named)
    for name, p in ours.named_parameters():
        p.data = named[name].data
    ours.tokenizer, tokenizer.eos_token_id, theirs.generation_config.eos_token_id = tokenizer, None, None
    draw, noise = random.Random(0), torch.Generator().manual_seed(1)
    wording = Wording(config.coord_format())
    return (
        ours,
        theirs,
        [
            (
                torch.randn(3, 336, 336, generator=noise),
                [loc_question(draw.choice(NAMES), wording, draw) for _ in range(args.questions)],
            )
            for _ in range(args.images * args.batches)
        ],
    )


def of_run(args):
    """The same of a run folder and of the questions that evaluate.py would ask about the held-out shapes, some of each image."""
    from transformers import LlavaForConditionalGeneration

    ours = LocVLM.from_pretrained(args.run).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(args.run, dtype=torch.float32).eval()
    fmt, world, by_image = ours.config.coord_format(), ensure_world(), {}
    records, _ = read_file(world / "instances_val.json", world / "images")
    for task in TASKS.values():
        for item in task.items(records, Wording(fmt), random.Random(0)):
            by_image.setdefault(item.image, []).append(item.question)
    enough = [(path, asked) for path, asked in by_image.items() if len(asked) >= args.questions]
    draw = random.Random(0)
    return (
        ours,
        theirs,
        [
            (preprocess(open_image(path), fmt.side, fmt.geometry), draw.sample(asked, args.questions))
            for path, asked in enough[: args.images * args.batches]
        ],
    )


def their_inputs(theirs, rows):
    """Rows of (pixels, ids) for `transformers`: padded on the left, the image in its own word."""
    longest = max(len(ids) for _, ids in rows)
    word = theirs.config.image_token_index
    return {
        "input_ids": torch.tensor(
            [[0] * (longest - len(ids)) + [word if i == IMAGE_ID else i for i in ids] for _, ids in rows]
        ),
        "attention_mask": torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for _, ids in rows]),
        "pixel_values": torch.stack([pixels for pixels, _ in rows]),
    }


def logit_gap(theirs, row, one, other, end):
    """How far apart theirs' logits are of the two tokens at which two answers to a row part."""
    (pixels, ids), pairs = row, list(zip([*one, end], [*other, end], strict=False))
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    logits = theirs(**their_inputs(theirs, [(pixels, ids + one[:at])])).logits[0, -1]
    return abs(float(logits[pairs[at][0]] - logits[pairs[at][1]]))


@torch.inference_mode()
def evaluation(args):
    """Print the seconds of both sides, the ratios, and every answer that is not the same."""
    torch.set_num_threads(args.threads)
    ours, theirs, asked = (of_run if args.run else stand_in)(args)
    tokenizer, count = ours.tokenizer, args.tokens
    end = tokenizer.eos_token_id
    tokenizer.decode = lambda ids: " ".join(map(str, ids))  # answers are compared token for token
    ours.for_inference()
    prefix = encode_prefix(tokenizer, "v1", ours.config.visual_tokens)

    def ask_ours(part):
        images, questions = zip(*part, strict=True)
        said = ours.generate(list(images), list(questions), count)
        return [list(map(int, answer.split())) for answers in said for answer in answers]

    def ask_theirs(part, rows):
        answers, each = [], [(pixels, prefix + encode_question(tokenizer, q)) for pixels, asked in part for q in asked]
        for start in range(0, len(each), rows):
            inputs = their_inputs(theirs, each[start : start + rows])
            said = theirs.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
            answers += [ids[: (ids + [end]).index(end)] for ids in said[:, inputs["input_ids"].shape[1] :].tolist()]
        return answers

    whole = args.images * args.questions
    sides = {f"ours, {args.images} images and {whole} questions at a time": ask_ours}
    for rows in args.rows or (whole, args.images):
        sides[f"theirs, {rows} rows at a time"] = lambda part, rows=rows: ask_theirs(part, rows)
    seconds, differ, tokens = dict.fromkeys(sides, 0.0), 0, 0
    for ask in sides.values():
        ask([(asked[0][0], asked[0][1][:1])])
    for start in range(0, len(asked), args.images):
        part, said = asked[start : start + args.images], {}
        for side, ask in sides.items():
            began = time.perf_counter()
            said[side] = ask(part)
            seconds[side] += time.perf_counter() - began
        our_side, *their_sides = said
        tokens += sum(map(len, said[our_side]))
        each = [(pixels, prefix + encode_question(tokenizer, q)) for pixels, questions in part for q in questions]
        for side in their_sides:
            for row, one, other in zip(each, said[our_side], said[side], strict=True):
                if one != other:
                    differ += 1
                    print(f"another answer: {side}, logits {logit_gap(theirs, row, one, other, end):.1e} apart")
    total, (our_seconds, *their_seconds) = sum(len(questions) for _, questions in asked), seconds.values()
    print(
        f"{args.run or 'random weights'}: {len(asked)} images, {total} questions, {tokens / total:.1f} tokens each, fp32, "
        f"{args.threads} threads; {differ} of {len(their_seconds) * total} answers of theirs differ from ours"
    )
    for side, taken in seconds.items():
        print(f"{side:42}  {taken:8.2f} s  {total / taken:8.2f} questions/s  {taken / our_seconds:5.1f} x (goal: 5)")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "what", nargs="?", choices=("train", "generate", "evaluate"), default="train", help="what to measure"
    )
    parser.add_argument("--llama", help="HF folder for `generate`, instead of random weights")
    parser.add_argument("--run", help="run folder for `evaluate`, instead of random weights")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of `transformers` at a time, instead of the two")
    for flag, default, what in (
        ("images", 4, "images in a batch"),
        ("questions", 6, "questions on each image"),
        ("layers", 8, "layers of LLaMA"),
        ("hidden-size", 512, "its width, a multiple of 64"),
        ("vocab-size", 32000, "its vocabulary"),
        ("steps", 5, "steps to time, after a first one"),
        ("threads", 2, "threads of each process"),
        ("tokens", 32, "tokens to generate, for `evaluate` at most"),
        ("batches", 1, "batches of images for `evaluate`"),
    ):
        parser.add_argument("--" + flag, type=int, default=default, help=what)
    args = parser.parse_args(argv)
    if args.what == "generate":
        return generation(args)
    if args.what == "evaluate":
        return evaluation(args)
    print(
        f"{args.questions} questions on each of {args.images} images, fp32, {args.threads} threads; forward, backward and AdamW, "
        f"median of {args.steps} steps"
    )
    print("allocator  side    parameters  rows x tokens  s / step  peak GiB  over start GiB  loss at first, last step")
    for tuned in (True, False):
        name = "tuned" if tuned else "as it is"
        results = {}
        for side in ("theirs", "ours"):
            r = results[side] = in_own_process(measure, side, tuned, args)
            print(
                f"{name:9}  {side:6}  {r['parameters'] / 1e6:8.1f} M  {'{} x {}'.format(*r['shape']):>13}  {r['seconds']:8.2f}  {r['peak']:8.2f}  "
                f"{r['growth']:14.2f}  {r['losses'][0]:.4f}, {r['losses'][-1]:.4f}",
                flush=True,
            )
        theirs, ours = results["theirs"], results["ours"]
        assert abs(theirs["losses"][0] - ours["losses"][0]) < 5e-5, (
            "the first losses differ: the sides do not compute the same"
        )
        print(
            f"{name:9}  {theirs['seconds'] / ours['seconds']:.2f} x as fast (goal: at least 4.5), {ours['peak'] / theirs['peak']:.3f} of the peak "
            f"(goal: at most 0.28), {ours['growth'] / theirs['growth']:.3f} of what the steps add",
            flush=True,
        )


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"bench.py: {error}")
