"""What only a GPU can show, in parts that fail alone: ``make gpu-check``, or ``python -m bench.gpu_check``.

A GPU may be lent for minutes, without warning, on a machine without a network. So nothing is installed; each part is a
process with a time limit, of which the first pass has four minutes in all; and what a part found is on disk before the
next one begins, in the folder that ``$OUT`` names or in bench/results/: ``gpu_check.jsonl``, a line for each part, and
``gpu_check.log``, all that was printed.

``runner`` starts the parts and knows neither torch nor tricomm, ``child`` is what it starts, ``parts`` names them.
"""
