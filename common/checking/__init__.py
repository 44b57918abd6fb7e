"""train.py --check: rows and a base in, a verdict out; nothing is trained.

In reading order:

check          every row judged, the heaviest step tried
rehearsal      the heaviest steps, timed, and the memory they took
check_report   what is printed of it
"""
