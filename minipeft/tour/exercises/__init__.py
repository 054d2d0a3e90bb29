"""Exercises: write a function of this library from its equation, and find public bugs with a test of your own.

    tasks/NAME.py     one exercise: its task (the docstring), a record (solution, hints), its checks
    record.py         the chapters and their order; the record
    definitions.py    the hole: a library function by name, its body removed
    judging.py        what the checks assert with: differences in words
    bugs.py           put a bug into the library while a test runs
    checking.py       run an exercise's checks in a process of its own, within a time limit
    folder.py         the student's folder: exercise_N.py, test_exercise_N.py, exercises.json

A check compares with an independent truth: float64 autograd, plain loops, an example worked by hand. The solution is
the library's own function, which its checks must accept; of its mutants they must refuse at least 95 in 100
(benchmarks/exercise_mutants.py).
"""
