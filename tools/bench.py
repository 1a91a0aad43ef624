"""Compare this code with `transformers` (pip install transformers): speed and peak memory, both sides in one run.

    python -m tools.bench             training: 63 M parameters, 6 questions about each of 4 images; some minutes, 10 GB
    python -m tools.bench generate    loading and generation: a LLaMA of SmolLM2-135M's shape, or --llama FOLDER
    python -m tools.bench evaluate    evaluation: 6 questions about each of 4 images at ViT-L/14's 336 px, or --run RUN

Training. Both sides have the same random weights, images, questions and answers (App. B, "v1" template), in fp32. The tower
is frozen; projector and LLaMA learn. A step is forward, backward and fused AdamW.

    ours     LocVLM.forward: B rows, each with its image once and k question/answer segments behind it (data.pack)
    theirs   LlavaForConditionalGeneration, fused attention, no cache: k * B right-padded rows, each with its image

Each measurement has its own process, and so its own peak: once with glibc's allocator set to keep freed memory
(formats.fast_cpu), once with its defaults. The first step allocates AdamW's moments; it counts for memory and not for time.
Its loss must agree to four decimals. Linux only (/proc).

Generation. Both sides load the same folder in fp32 and continue prompts greedily, one row and eight. Ours runs three times:
after `for_inference()`, compiled, and with bf16 weights. A token reads every weight but the embeddings; "of limit" is the time
to sum as many bytes, as a share of the time of one token in one row.

Evaluation. LocVLM.generate answers batches of images with k questions each. `transformers` reads one row per question: as many
rows at a time as our batch has questions, and as it has images. Both have the same fp32 weights in one process and alternate
by batch, after one question that does not count. Images are preprocessed beforehand. The model is a LLaVA of random weights
that never ends an answer, or --run with evaluate.py's questions about the held-out shapes. Where answers differ, the gap
between the logits of the first two different tokens is printed.
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

import data
from clip_vit import CLIPVisionConfig, open_image, preprocess
from coords import CoordFormat
from evaluate import ITEMS
from formats.annotations import read_file
from formats.fast_cpu import keep_freed_memory
from formats.files import write_json
from formats.weights import write_tensors
from llama import Llama, LlamaConfig
from model import LocVLM, LocVLMConfig
from tiny.shapes import ensure_world

VISION = CLIPVisionConfig(256, 1024, 6, 4, image_size=224)  # 256 patches, as ViT-L/14 at 224 px
VIT_L = CLIPVisionConfig(image_size=336)
SMOLLM2 = {  # config.json of SmolLM2-135M
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "model_type": "llama", "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
NAMES = ("dog", "cup", "traffic light", "orange", "dining table", "person", "bicycle", "laptop")


class StandInTokenizer:
    """Words and single characters -> ids in order of appearance: about as many as LLaMA's pieces."""

    bos_token_id, eos_token_id = 1, 2

    def __init__(self):
        self.ids = {}

    def encode(self, text):
        # LLaMA too spends a piece on each digit, and on the space before it
        pieces = re.findall(r"[A-Za-z]+| (?=\d)|\S|\n", text)
        return [self.ids.setdefault(piece, 3 + len(self.ids)) for piece in pieces]

    def decode(self, ids):
        return " ".join(map(str, ids))


# ----- both sides with the same weights


def their_llava(config):
    """Make `transformers`' Llava of our config. Its image placeholder must be in the vocabulary: the last word."""
    try:
        from transformers import LlavaConfig, LlavaForConditionalGeneration
    except ImportError as error:
        raise ImportError(f"cannot import transformers ({error}), the other side; pip install transformers") from None
    llava = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vars(config.vision_config)},
        text_config={"model_type": "llama", **vars(config.text_config)},
        image_token_index=config.text_config.vocab_size - 1,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    return LlavaForConditionalGeneration(llava)


def our_name(name):
    """Translate a parameter's name in `transformers`' Llava to ours."""
    name = name.removeprefix("model.").replace("vision_tower.vision_model.", "vision_tower.")  # older versions
    return name.replace("multi_modal_projector.", "adapter.").replace("lm_head.", "language_model.lm_head.")


def draw_weights(named):
    """Draw every weight, in the order of our names: both sides get the same, without a second copy in memory."""
    generator = torch.Generator().manual_seed(0)
    for name, p in sorted(named.items()):
        noise = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            p.data.copy_(noise * p[0].numel() ** -0.5)
        else:
            p.data.copy_(0.1 * noise + float("norm" in name and name.endswith("weight")))


def padded(rows, fill, left=False):
    """Pad lists of ids to one length: a tensor (rows, T)."""
    fills = [[fill] * (max(map(len, rows)) - len(row)) for row in rows]
    return torch.tensor([more + row if left else row + more for row, more in zip(rows, fills, strict=True)])


# ----- measuring


def memory(key):
    """Return this process's memory in GiB: `VmRSS` is now, `VmHWM` its peak."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key + ":")) / 2**20


def in_own_process(call, *args):
    """Call a function in a new process, with its own memory and allocator, and return its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(call, *args).result()


def clock(call, times=3):
    """Return the median seconds of a call, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


# ----- training


def make_rows(args, is_packed):
    """Make the packed rows and their images: k questions to a row, or each in its own row with its image again."""
    rng, tokenizer, wording = random.Random(0), StandInTokenizer(), data.Wording(CoordFormat("ivb", VISION.image_size))

    def segment():
        x1, y1, x2, y2 = (rng.randrange(*span) for span in ((0, 140), (0, 105), (140, 280), (105, 210)))
        answer = data.LOC_ANSWER.format(loc=wording.place((x1, y1, x2, y2), (640, 480)))  # bins of two digits
        return data.encode_segment(tokenizer, "v1", [(data.loc_question(rng.choice(NAMES), wording, rng), answer)])

    prefix = data.encode_prefix(tokenizer, "v1", VISION.num_patches)
    segments = [[segment() for _ in range(args.questions)] for _ in range(args.images)]
    side, noise = VISION.image_size, torch.Generator().manual_seed(1)
    images = torch.randn(args.images, 3, side, side, generator=noise)
    if not is_packed:
        segments = [[one] for of_image in segments for one in of_image]
        images = images.repeat_interleave(args.questions, dim=0)
    return [data.pack(prefix, of_row, LlamaConfig.max_position_embeddings) for of_row in segments], images


def build(side, args):
    """Return a side's parameters under our names, the call that computes its loss, and (rows, tokens) of its batch."""
    width = args.hidden_size
    intermediate = -(-width * 8 // 3 // 32) * 32  # LLaMA's 8/3, to a multiple of 32
    text = LlamaConfig(args.vocab_size, width, intermediate, args.layers, width // 64)
    config = LocVLMConfig(VISION, text, "mlp2x_gelu")  # `transformers` has no other adapter
    rows, images = make_rows(args, is_packed=side == "ours")
    if side == "ours":
        model, batch = LocVLM(config), data.collate(rows)
        return dict(model.named_parameters()), lambda: model(images, **batch), tuple(batch["input_ids"].shape)
    model, ids = their_llava(config), [row["input_ids"] for row in rows]
    inputs = {
        "input_ids": padded(ids, 0).masked_fill_(padded(ids, 0) == data.IMAGE_ID, args.vocab_size - 1),
        "labels": padded([row["labels"] for row in rows], data.IGNORE),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "pixel_values": images,
    }
    named = {our_name(name): p for name, p in model.named_parameters()}
    return named, lambda: model(**inputs, use_cache=False).loss, tuple(inputs["input_ids"].shape)


def measure_training(side, is_tuned, args):
    """Train one side for some steps, in this process."""
    if is_tuned:
        keep_freed_memory()
    torch.set_num_threads(args.threads)
    named, loss_of_batch, shape = build(side, args)
    draw_weights(named)
    for name, p in named.items():
        p.requires_grad_(not name.startswith("vision_tower."))
    optimizer = torch.optim.AdamW([p for p in named.values() if p.requires_grad], lr=2e-5, fused=True)
    before, losses, seconds = memory("VmRSS"), [], []
    for _ in range(1 + args.steps):
        began = time.perf_counter()
        loss = loss_of_batch()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
        losses.append(loss.item())
    peak, size = memory("VmHWM"), sum(p.numel() for p in named.values())
    return {
        "shape": "{} x {}".format(*shape), "parameters": size, "losses": losses, "seconds": statistics.median(seconds[1:]),
        "peak": peak, "growth": peak - before,
    }  # fmt: skip


def training(args):
    """Print both sides' steps, and the ratios."""
    print(
        f"{args.questions} questions about each of {args.images} images, fp32, {args.threads} threads; forward, backward and "
        f"AdamW, median of {args.steps} steps"
    )
    print("allocator  side    parameters  rows x tokens  s / step  peak GiB  over start GiB  loss at first, last step")
    for is_tuned in (True, False):
        name, results = "tuned" if is_tuned else "default", {}
        for side in ("theirs", "ours"):
            r = results[side] = in_own_process(measure_training, side, is_tuned, args)
            print(
                f"{name:9}  {side:6}  {r['parameters'] / 1e6:8.1f} M  {r['shape']:>13}  {r['seconds']:8.2f}  {r['peak']:8.2f}  "
                f"{r['growth']:14.2f}  {r['losses'][0]:.4f}, {r['losses'][-1]:.4f}",
                flush=True,
            )
        theirs, ours = results["theirs"], results["ours"]
        assert abs(theirs["losses"][0] - ours["losses"][0]) < 5e-5, "the first losses differ"
        print(
            f"{name:9}  {theirs['seconds'] / ours['seconds']:.2f} x as fast (goal: at least 4.5), "
            f"{ours['peak'] / theirs['peak']:.3f} of the peak (goal: at most 0.28), "
            f"{ours['growth'] / theirs['growth']:.3f} of what the steps add",
            flush=True,
        )


# ----- loading and generation


def write_llama(folder):
    """Write a random LLaMA of SmolLM2-135M's shape as a HF folder."""
    write_json(folder / "config.json", {"architectures": ["LlamaForCausalLM"], **SMOLLM2})
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_dict(SMOLLM2))
    named = {f"model.{k}": torch.empty(v.shape) for k, v in llama.state_dict().items() if k != "lm_head.weight"}
    draw_weights(named)
    write_tensors(folder / "model.safetensors", named)


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
    # a token reads every weight, but only one row of the embeddings, unless the head is tied to them
    is_tied = model.lm_head.weight is (model.model if side == "theirs" else model).embed_tokens.weight
    moved = sum(p.nbytes for p in model.parameters()) - (not is_tied) * model.lm_head.weight.nbytes
    if side != "theirs":
        model.for_inference(compile=side == "compiled")

    def answer(prompts, count):
        """Continue prompts of one length greedily."""
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
    found["limit"] = clock(torch.ones(moved // 4).sum, times=9)
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
        assert side == "bf16" or r["answer"] == theirs["answer"], f"{side}: the answer differs from transformers'"
        print(
            f"{side}: {theirs['load'] / r['load']:.1f} x as fast to load, {theirs['prefill'] / r['prefill']:.1f} x prefill, "
            f"{theirs[1] / r[1]:.1f} x one row (goal: 2), {theirs[8] / r[8]:.1f} x eight rows (goal: 2)"
        )


# ----- evaluation


def stand_in(args):
    """Make ours and theirs with the same random weights, and questions: a list of (pixels (3, S, S), questions)."""
    config, tokenizer = LocVLMConfig(VIT_L, LlamaConfig.from_dict(SMOLLM2), "mlp2x_gelu"), StandInTokenizer()
    theirs, ours = their_llava(config).eval(), LocVLM(config).eval()
    named = {our_name(name): p for name, p in theirs.named_parameters()}
    draw_weights(named)
    for name, p in ours.named_parameters():
        p.data = named[name].data
    ours.tokenizer, tokenizer.eos_token_id, theirs.generation_config.eos_token_id = tokenizer, None, None
    draw, noise, wording = random.Random(0), torch.Generator().manual_seed(1), data.Wording(config.coord_format())
    images = [torch.randn(3, VIT_L.image_size, VIT_L.image_size, generator=noise) for _ in range(args.images * args.batches)]
    return ours, theirs, [
        (pixels, [data.loc_question(draw.choice(NAMES), wording, draw) for _ in range(args.questions)]) for pixels in images
    ]  # fmt: skip


def of_run(args):
    """Load a run on both sides, with some of evaluate.py's questions about each held-out shapes image."""
    from transformers import LlavaForConditionalGeneration

    ours = LocVLM.from_pretrained(args.run).eval()
    theirs = LlavaForConditionalGeneration.from_pretrained(args.run, dtype=torch.float32).eval()
    config, world, by_image = ours.config, ensure_world(), {}
    records, _ = read_file(world / "instances_val.json", world / "images")
    for make in ITEMS.values():
        for item in make(records, data.Wording(config.coord_format()), random.Random(0)):
            by_image.setdefault(item.image, []).append(item.question)
    enough = [(path, questions) for path, questions in by_image.items() if len(questions) >= args.questions]
    draw = random.Random(0)
    return ours, theirs, [
        (preprocess(open_image(path), config.vision_config, config.geometry), draw.sample(questions, args.questions))
        for path, questions in enough[: args.images * args.batches]
    ]  # fmt: skip


def their_inputs(theirs, rows):
    """Batch rows of (pixels, ids) for `transformers`: padded on the left, with its own image placeholder."""
    ids, word = [ids for _, ids in rows], theirs.config.image_token_index
    return {
        "input_ids": padded([[word if i == data.IMAGE_ID else i for i in row] for row in ids], 0, left=True),
        "attention_mask": padded([[1] * len(row) for row in ids], 0, left=True),
        "pixel_values": torch.stack([pixels for pixels, _ in rows]),
    }


def logit_gap(theirs, row, one, other, end):
    """Return the difference of their logits for the first two tokens that differ between two answers to a row."""
    (pixels, ids), pairs = row, list(zip([*one, end], [*other, end], strict=False))
    at = next(i for i, (a, b) in enumerate(pairs) if a != b)
    logits = theirs(**their_inputs(theirs, [(pixels, ids + one[:at])])).logits[0, -1]
    return abs(float(logits[pairs[at][0]] - logits[pairs[at][1]]))


def answer_theirs(theirs, rows, size, count, end):
    """Answer rows of (pixels, ids), `size` of them at a time: lists of ids up to the end token."""
    answers = []
    for start in range(0, len(rows), size):
        inputs = their_inputs(theirs, rows[start : start + size])
        ids = theirs.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)
        answers += [row[: (row + [end]).index(end)] for row in ids[:, inputs["input_ids"].shape[1] :].tolist()]
    return answers


@torch.inference_mode()
def evaluation(args):
    """Print the seconds of both sides, the ratios, and every answer that differs."""
    torch.set_num_threads(args.threads)
    ours, theirs, asked = (of_run if args.run else stand_in)(args)
    tokenizer, end = ours.tokenizer, ours.tokenizer.eos_token_id
    tokenizer.decode = lambda ids: " ".join(map(str, ids))  # answers are compared token by token
    ours.for_inference()
    prefix = data.encode_prefix(tokenizer, "v1", ours.config.visual_tokens)

    def rows_of(part):
        return [(pixels, prefix + data.encode_question(tokenizer, q)) for pixels, questions in part for q in questions]

    def answer_ours(part):
        answers = ours.generate(*map(list, zip(*part, strict=True)), args.tokens)
        return [list(map(int, answer.split())) for of_image in answers for answer in of_image]

    whole = args.images * args.questions
    sides = {f"ours, {args.images} images and {whole} questions at a time": answer_ours}
    for size in args.rows or (whole, args.images):
        sides[f"theirs, {size} rows at a time"] = lambda part, size=size: answer_theirs(
            theirs, rows_of(part), size, args.tokens, end
        )
    seconds, differ, tokens = dict.fromkeys(sides, 0.0), 0, 0
    for answer in sides.values():
        answer([(asked[0][0], asked[0][1][:1])])
    for start in range(0, len(asked), args.images):
        part, answers = asked[start : start + args.images], {}
        for side, answer in sides.items():
            began = time.perf_counter()
            answers[side] = answer(part)
            seconds[side] += time.perf_counter() - began
        of_ours, *of_theirs = answers.items()
        tokens += sum(map(len, of_ours[1]))
        for side, others in of_theirs:
            for row, one, other in zip(rows_of(part), of_ours[1], others, strict=True):
                if one != other:
                    differ += 1
                    print(f"answers differ: {side}, logits {logit_gap(theirs, row, one, other, end):.1e} apart")
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
    whats = {"train": training, "generate": generation, "evaluate": evaluation}
    parser.add_argument("what", nargs="?", choices=whats, default="train", help="what to measure")
    parser.add_argument("--llama", help="HF folder for `generate`, instead of random weights")
    parser.add_argument("--run", help="run folder for `evaluate`, instead of random weights")
    parser.add_argument("--rows", type=int, nargs="+", help="rows of `transformers` at a time, instead of the two")
    for flag, default, what in (
        ("images", 4, "images in a batch"),
        ("questions", 6, "questions about each image"),
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
    whats[args.what](args)


if __name__ == "__main__":
    try:
        main()
    except ImportError as error:
        sys.exit(f"tools.bench: {error}")
