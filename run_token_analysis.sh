#!/bin/sh
# Analyses one answer of the embedded model into analysis_results/, or whatever the arguments say instead:
#     ./run_token_analysis.sh
#     ./run_token_analysis.sh --model_name runs/tiny/checkpoints/latest --skip_individual_pdfs --output_dir after
# PYTHON: the interpreter; default the one that `make train` set up, else python3.
here=$(dirname "$0")
if [ -z "$PYTHON" ]; then
    PYTHON=$here/.venv/bin/python
    [ -x "$PYTHON" ] || PYTHON=python3
fi
exec "$PYTHON" "$here/token_analysis.py" --output_dir analysis_results "$@"
