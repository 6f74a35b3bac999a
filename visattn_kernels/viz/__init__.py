"""What the command `visattn` is made of, beyond visattn_cli.py, where it begins.

app.py says what the commands take that draw, images.py reads pictures, compute.py calls the library, figures.py draws
pictures and gallery.py patterns, output.py writes files whole or not at all: all this needs the extra `[viz]`, and
nothing else in the library does. machine.py, which describes the machine, needs the library alone.
"""
