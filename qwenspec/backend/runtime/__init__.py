"""Files of a generated package that hold no model structure: plain Python, folded and copied in."""
