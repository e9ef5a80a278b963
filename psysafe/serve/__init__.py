"""An OpenAI-compatible server: base and adapters of one model, answered together in one batch, and a page to try them.

python -m psysafe.serve --adapter tuned=runs/tiny
"""
