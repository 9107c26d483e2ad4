"""Makes examples/tiny-llama from scratch: a base model that can handle strings, but no demo task.

    python -m examples.demo.pretrain --out examples/tiny-llama

The demo needs a model small enough for two CPU cores and yet not random: SEEKR is about keeping
what a pre-trained model's heads do. So a 4-layer byte-level Llama is trained for some minutes on
generic string material (copying, picking, repeating, spelling, replacing) in many formats, plus
runs of plain copied bytes. None of the demo's four maps is in it. The weights are written as
bfloat16, half the size, and loaded as float32.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch

from seekr.models import byte_tokenizer, save_model, tiny_llama

LETTERS = "abcdefghijklmnopqrstuvwxyz"
IGNORE = -100


def _words(draw: random.Random) -> str:
    return "".join(draw.choices(LETTERS, k=draw.randint(3, 9)))


def _nth(text: str, draw: random.Random) -> tuple[str, str]:
    index = draw.randrange(len(text))
    return f"{index + 1} of {text}", text[index]


def _nth_last(text: str, draw: random.Random) -> tuple[str, str]:
    index = draw.randrange(len(text))
    return f"{index + 1} from end of {text}", text[len(text) - 1 - index]


def _after(text: str, draw: random.Random) -> tuple[str, str]:
    text = "".join(dict.fromkeys(text + "qzx"))
    index = draw.randrange(len(text) - 1)
    return f"after {text[index]} in {text}", text[index + 1]


def _before(text: str, draw: random.Random) -> tuple[str, str]:
    text = "".join(dict.fromkeys(text + "qzx"))
    index = draw.randrange(1, len(text))
    return f"before {text[index]} in {text}", text[index - 1]


def _replace(text: str, draw: random.Random) -> tuple[str, str]:
    old, new = draw.choice(text), draw.choice(LETTERS)
    return f"{old} to {new} in {text}", text.replace(old, new)


def _from(text: str, draw: random.Random) -> tuple[str, str]:
    index = draw.randrange(len(text))
    return f"from {index + 1} {text}", text[index:]


def _upto(text: str, draw: random.Random) -> tuple[str, str]:
    index = draw.randrange(1, len(text) + 1)
    return f"up to {index} {text}", text[:index]


Drill = Callable[[str, random.Random], tuple[str, str]]
DRILLS: dict[str, Drill] = {
    "copy": lambda text, _: (f"copy: {text}", text),
    "upper": lambda text, _: (f"upper: {text}", text.upper()),
    "spell": lambda text, _: (f"spell: {text}", "-".join(text)),
    "double": lambda text, _: (f"double: {text}", "".join(2 * letter for letter in text)),
    "twice": lambda text, _: (f"twice: {text}", text + text),
    "odd": lambda text, _: (f"odd: {text}", text[::2]),
    "even": lambda text, _: (f"even: {text}", text[1::2]),
    "ends": lambda text, _: (f"ends: {text}", text[0] + text[-1]),
    "count": lambda text, _: (f"count: {text}", str(len(text))),
    "nth": _nth,
    "nth_last": _nth_last,
    "after": _after,
    "before": _before,
    "replace": _replace,
    "from": _from,
    "upto": _upto,
}
JOINTS = (" = ", " -> ", "\n", " | ", ": ")


def document(draw: random.Random) -> tuple[str, str]:
    """Draw one (prompt, continuation); the loss is on the continuation."""
    if draw.random() < 0.15:
        run = "".join(
            draw.choices(LETTERS + LETTERS.upper() + "0123456789 .,", k=draw.randint(4, 16))
        )
        return run + "\n", run
    prompt, answer = DRILLS[draw.choice(tuple(DRILLS))](_words(draw), draw)
    return prompt + draw.choice(JOINTS), answer


def batch(draw: random.Random, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return right-padded ids, mask and labels [size, T]; byte b is id b + 2, EOS is 1."""
    pairs = [document(draw) for _ in range(size)]
    ids = [[byte + 2 for byte in (prompt + answer).encode()] + [1] for prompt, answer in pairs]
    width = max(map(len, ids))
    input_ids = torch.zeros(size, width, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    labels = torch.full_like(input_ids, IGNORE)
    for index, (row, (prompt, _)) in enumerate(zip(ids, pairs, strict=True)):
        input_ids[index, : len(row)] = torch.tensor(row)
        mask[index, : len(row)] = 1
        labels[index, len(prompt.encode()) : len(row)] = torch.tensor(row[len(prompt.encode()) :])
    return input_ids, mask, labels


def pretrain(out: Path, *, steps: int, size: int, peak_lr: float, seed: int) -> None:
    """Train with AdamW, warm-up and cosine decay, print the loss, write model and tokenizer."""
    draw = random.Random(seed)
    model = tiny_llama(258, 128, 4, 8, 4, seed=seed, max_positions=2048).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak_lr, betas=(0.9, 0.98), weight_decay=0.01
    )
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.01, total_iters=steps // 20)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps - steps // 20, peak_lr / 20)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warmup, decay], [steps // 20])
    started, total = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        input_ids, mask, labels = batch(draw, size)
        loss = model(input_ids=input_ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        total += loss.item()
        if step % 200 == 0:
            print(
                f"step {step} loss {total / 200:.4f} {time.perf_counter() - started:.0f}s",
                flush=True,
            )
            total = 0.0
    save_model(model.eval().bfloat16(), byte_tokenizer(), out)


def main() -> None:
    """Parse the command line and pre-train."""
    parser = argparse.ArgumentParser(description="Pre-train the demo's base model.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps")
    parser.add_argument("--batch", type=int, default=32, help="documents per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and documents")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pretrain(args.out, steps=args.steps, size=args.batch, peak_lr=args.lr, seed=args.seed)


if __name__ == "__main__":
    main()
