def save_examples(d,ds): pass
def draw(d): pass
