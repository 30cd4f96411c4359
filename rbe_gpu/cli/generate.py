"""`rbe-gpu generate`: continue a text, or answer a message, with a decoder."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ._compiling import compiling
from ._errors import about, fail, usage
from ._inputs import check_model, read_lines
from ._options import number
from ._output import Json, print_json


def command(
    model: Annotated[
        str,
        typer.Argument(
            metavar="FILE", help="A .rbe.safetensors or .gguf file, a model folder or hf://OWNER/NAME."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Argument(help="The text to continue. Default: what standard input holds.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, max=10**6, help="Maximum number of new tokens.")
    ] = 128,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Treat the text as a user's message, with the model's chat template."),
    ] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: the system message.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            callback=number(), help="0 takes the most probable token. Default: as the model says, else 0."
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, max=10**9, help="Sample from this many of the most probable tokens; 0: all."),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            callback=number(most=1.0, above=True),
            help="Sample from the most probable tokens that together reach this probability.",
        ),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            callback=number(above=True), help="Above 1: make tokens that already occurred less probable."
        ),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Stop at this string; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Seed of the sampling.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a text. The text goes to standard output while it is generated, its speed to standard error."""
    check_model(model)
    if system is not None and not chat:
        usage("it goes with --chat", "--system")
    if stop is not None and "" in stop:
        usage("it is empty", "--stop")
    if prompt is None:
        prompt = "\n".join(read_lines(Path("-")))
    if not prompt:
        fail("the prompt is empty; give a text to continue")
    from ..models.load import load_decoder

    start = time.perf_counter()
    with about(model), compiling(model, None):
        decoder = load_decoder(model)
        loaded = time.perf_counter()
        if chat:
            messages = [] if system is None else [{"role": "system", "content": system}]
            ids = decoder.chat_ids([*messages, {"role": "user", "content": prompt}])
        else:
            ids = decoder.token_ids(prompt)
        first: list[float] = []
        before = "" if chat else prompt

        def show(_: int, text: str) -> None:
            if not as_json:
                sys.stdout.write(text if first else before + text)
                sys.stdout.flush()
            if not first:
                first.append(time.perf_counter())

        made = decoder.generate(
            [ids],
            max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
            stop=stop or (),
            seed=seed,
            on_text=show,
        )[0]
    ended = time.perf_counter()
    after = ended - (first[0] if first else ended)
    rate = (len(made.ids) - 1) / after if len(made.ids) > 1 and after > 0 else 0.0
    facts: dict[str, Any] = {
        "prompt_tokens": made.prompt_tokens,
        "new_tokens": len(made.ids),
        "reason": made.reason,
        "load_seconds": loaded - start,
        "first_token_seconds": (first[0] if first else ended) - loaded,
        "tokens_per_second": rate,
    }
    if as_json:
        print_json({"text": made.text, **facts})
        return
    print("" if first else before)
    print(
        f"rbe-gpu: {made.prompt_tokens} + {len(made.ids)} tokens ({made.reason}); loaded in "
        f"{facts['load_seconds']:.2f} s, first text after {facts['first_token_seconds']:.2f} s, "
        f"then {rate:.1f} tokens/s",
        file=sys.stderr,
    )
