"""Style and behaviour of the HTML page: inline, small, and loading nothing from elsewhere."""

STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: #2b3442;
  font: 14px/1.45 Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, sans-serif; }
main { max-width: 1500px; margin: 0 auto; padding: 16px 20px 48px; }
.view { display: flex; gap: 14px; align-items: stretch; }
.pane { position: relative; flex: 1 1 auto; min-width: 0; height: 86vh; overflow: hidden; border: 1px solid #d9dfe7;
  border-radius: 10px; background: #fff; cursor: grab; touch-action: none; }
.pane.drag { cursor: grabbing; }
.pane > svg { position: absolute; left: 0; top: 0; transform-origin: 0 0; user-select: none; }
.tools { position: absolute; right: 12px; top: 12px; display: flex; gap: 6px; }
.tools button { min-width: 32px; height: 32px; padding: 0 9px; border: 1px solid #cfd6df; border-radius: 7px;
  background: #fff; color: #3a4556; font: inherit; cursor: pointer; }
.tools button:hover { background: #f1f4f8; }
aside { flex: 0 0 340px; max-height: 86vh; overflow: auto; border: 1px solid #d9dfe7; border-radius: 10px;
  padding: 14px 16px; background: #fbfcfd; }
aside h2 { font-size: 14px; margin: 0 0 8px; }
pre { margin: 0; font: 12px/1.5 ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
aside pre + pre { margin-top: 12px; padding-top: 12px; border-top: 1px solid #e1e6ec; }
.tip { position: fixed; display: none; max-width: 440px; padding: 8px 11px; border-radius: 8px; background: #222b38;
  color: #f4f6f9; pointer-events: none; z-index: 9; box-shadow: 0 4px 14px rgba(20, 30, 45, .25); }
g.op, g.stage { cursor: pointer; }
svg.hover g.edge { opacity: .18; }
svg.hover g.edge.lit { opacity: 1; }
g.stage.picked rect { fill: #e8effb; }
h2 { font-size: 16px; margin: 30px 0 8px; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th { text-align: left; color: #667284; font-weight: 600; }
th, td { padding: 6px 12px 6px 0; border-bottom: 1px solid #e6eaef; vertical-align: top; }
td span { color: #8390a1; }
@media (max-width: 900px) { .view { flex-direction: column; } aside { flex-basis: auto; } }
"""

SCRIPT = """
(() => {
  const pane = document.querySelector('.pane'), svg = pane.querySelector('svg');
  const tip = document.querySelector('.tip'), words = tip.querySelector('pre'), side = document.querySelector('aside');
  const size = svg.viewBox.baseVal;
  let x = 0, y = 0, scale = 1, from = null, moved = false;
  const show = () => { svg.style.transform = `translate(${x}px,${y}px) scale(${scale})`; };
  const zoom = (factor, cx, cy) => {
    const next = Math.min(6, Math.max(0.02, scale * factor));
    x = cx - (cx - x) * next / scale; y = cy - (cy - y) * next / scale; scale = next; show();
  };
  const fit = whole => {
    scale = Math.min(1.25, pane.clientWidth / size.width, whole ? pane.clientHeight / size.height : 9);
    x = Math.max(0, (pane.clientWidth - size.width * scale) / 2); y = 0; show();
  };
  const middle = factor => zoom(factor, pane.clientWidth / 2, pane.clientHeight / 2);
  document.getElementById('in').onclick = () => middle(1.25);
  document.getElementById('out').onclick = () => middle(0.8);
  document.getElementById('width').onclick = () => fit(false);
  document.getElementById('all').onclick = () => fit(true);
  pane.addEventListener('wheel', event => {
    const box = pane.getBoundingClientRect();
    if (event.ctrlKey || event.metaKey) {
      event.preventDefault();
      zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
      return;
    }
    const end = Math.min(0, pane.clientHeight - size.height * scale);  // at either end the page scrolls on
    const next = Math.max(Math.min(end, y), Math.min(Math.max(0, y), y - event.deltaY));
    if (next !== y || event.deltaX) { event.preventDefault(); x -= event.deltaX; y = next; show(); }
  }, { passive: false });
  pane.addEventListener('pointerdown', event => {
    if (event.target.closest('.tools')) return;
    from = [event.clientX - x, event.clientY - y]; moved = false;
  });
  window.addEventListener('pointermove', event => {
    if (!from) return;
    const nx = event.clientX - from[0], ny = event.clientY - from[1];
    if (Math.abs(nx - x) + Math.abs(ny - y) > 3 || moved) {
      moved = true; x = nx; y = ny; pane.classList.add('drag'); tip.style.display = 'none'; show();
    }
  });
  window.addEventListener('pointerup', () => { from = null; pane.classList.remove('drag'); });
  const lines = [...svg.querySelectorAll('g.edge')].map(edge => [edge, edge.dataset.ops.split(' ')]);
  svg.querySelectorAll('g').forEach(group => {
    const title = group.querySelector(':scope > title');
    if (!title) return;
    const text = title.textContent;
    title.remove();
    group.addEventListener('pointermove', event => {
      if (from && moved) return;
      words.textContent = text; tip.style.display = 'block';
      const box = tip.getBoundingClientRect();
      tip.style.left = Math.min(event.clientX + 14, innerWidth - box.width - 8) + 'px';
      tip.style.top = Math.min(event.clientY + 14, innerHeight - box.height - 8) + 'px';
    });
    group.addEventListener('pointerleave', () => { tip.style.display = 'none'; });
    if (group.dataset.op !== undefined) {
      group.addEventListener('pointerenter', () => {
        lines.forEach(([edge, ops]) => edge.classList.toggle('lit', ops.includes(group.dataset.op)));
        svg.classList.add('hover');
      });
      group.addEventListener('pointerleave', () => svg.classList.remove('hover'));
    }
    if (group.dataset.stage !== undefined || group.dataset.op !== undefined) {
      group.addEventListener('click', () => {
        if (moved) return;
        svg.querySelectorAll('.picked').forEach(other => other.classList.remove('picked'));
        group.classList.add('picked');
        const parts = [text];
        const note = document.getElementById('note-' + group.dataset.stage);
        if (note) parts.push(note.textContent);
        side.replaceChildren(...parts.map(part => {
          const block = document.createElement('pre'); block.textContent = part; return block;
        }));
        side.hidden = false;
      });
    }
  });
  fit(false);
  pane.style.height = Math.min(innerHeight * 0.86, Math.max(size.height * scale, 420)) + 'px';
})();
"""
