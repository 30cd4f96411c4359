"""Coverage-guided fuzzing with atheris (libFuzzer): `python -m tests.fuzz TARGET --seconds 60`, or `make fuzz`.

Targets: `reader` (mutated .rbe.safetensors files), `folder` (folders of a BERT encoder, every file of which may
change), `decoder_folder` (of decoders and what is read like them), `tokenizer` (stored in a model file), `gguf` and
`command_line`. An input fails when it crashes the process, raises an exception that the function does not promise,
takes more than a second of processor time, or more memory than its size allows. libFuzzer then writes it to a file
and stops:

    python -m tests.fuzz reader FILE ...     runs the inputs of files again
"""
