"""Does one method beat another? A grid of methods x seeds, judged on held-out subjects, with intervals.

`methods` knows the methods by name, `grid` turns a YAML into cells, `cells` runs them, `analysis` reads a grid as
numbers with their uncertainty, `findings` says what they show in words, and `page` puts the report together.
"""
