"""Does one method beat another? A grid of methods x seeds, judged on held-out subjects, with intervals.

`methods` knows the methods by name, `grid` turns a YAML into cells, `cells` reads and runs them, `measures` holds what
is measured and never trained on, `results` reads a grid back as numbers, `analysis` says how sure they are, `findings`
says it in words, `page` puts the report together.
"""
