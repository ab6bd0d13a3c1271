from scripts.tables import PAGES, rendered
from scripts.tables.figures import draw_all
from scripts.tables.records import ROOT

for path in PAGES:
    text = path.read_text()
    if (now := rendered(text)) != text:
        path.write_text(now)
        print(f"written: {path.relative_to(ROOT)}")
for figure in draw_all():
    print(f"drawn: {figure.relative_to(ROOT)}")
