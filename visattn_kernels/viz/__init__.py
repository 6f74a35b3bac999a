"""What the command `visattn` is made of, after visattn_cli.py, where it begins.

All but machine.py needs the extra `[viz]`, and nothing else in the library needs it.
app.py says what the command takes, images.py reads pictures, compute.py calls the library, figures.py draws pictures
and gallery.py patterns, output.py writes files whole or not at all, machine.py describes the machine.
"""
