// The page of a control graph: blocks that open in place. Reads the JSON that pagedata.py describes.
(() => {
  'use strict';
  const D = JSON.parse(document.getElementById('data').textContent);
  const pane = document.querySelector('.pane'), svg = pane.querySelector('svg'), world = svg.querySelector('g');
  const tip = document.querySelector('.tip'), words = tip.querySelector('pre');
  const said = document.getElementById('said'), find = document.getElementById('find');
  const LABELS = 126, PAD = 14, HEAD = 26, GAP = 8, STRONG = 1, DASHED = 2, ARROW = 4, MOST_OPEN = 4000;
  const BANDS = ['#f5f7fa', '#fcfdfe'];
  const open = new Set(D.open), parent = new Map();
  D.blocks.forEach((block, id) => block.kids.forEach(kid => { if (kid !== null && kid < 0) parent.set(-1 - kid, id); }));

  const text = lines => lines.map(line => D.lines[line]).join('\n');
  const escaped = string => string.replace(/[&<>"]/g, c => ({ '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;' })[c]);
  const n = value => Math.round(value * 10) / 10;
  const title = ([first, last]) => first === last ? `stage ${first}` : `stages ${first}–${last}`;
  const short = (string, limit) => {
    if (string.length <= limit) return string;
    const tail = Math.floor((limit - 1) * 2 / 3);
    return string.slice(0, limit - 1 - tail) + '…' + string.slice(string.length - tail);
  };

  // A name without the module path it lies under; a number alone would say nothing.
  const within = (name, path) => {
    const rest = path && name.startsWith(path + '.') ? name.slice(path.length + 1) : name;
    return rest !== name && /^\d/.test(rest) ? `${path.split('.').pop()}.${rest}` : rest;
  };

  // --- layout: a block's own layout, stretched where children are open ------------------------------------------------

  // A monotone map of one axis that makes each interval [low, high] at least as long as its wish.
  function stretched(wishes) {
    const marks = [...new Set(wishes.flatMap(([low, high]) => [low, high]))].sort((a, b) => a - b);
    const pieces = [];
    let gained = 0;
    for (let i = 0; i + 1 < marks.length; i++) {
      const [low, high] = [marks[i], marks[i + 1]];
      const factor = Math.max(1, ...wishes.filter(w => w[0] <= low && high <= w[1]).map(w => w[2] / (w[1] - w[0])));
      pieces.push([low, high, low + gained, factor]);
      gained += (factor - 1) * (high - low);
    }
    return at => {
      let shift = 0;
      for (const [low, high, start, factor] of pieces) {
        if (at < low) break;
        if (at <= high) return start + (at - low) * factor;
        shift = start + (high - low) * factor - high;
      }
      return at + shift;
    };
  }

  function compose(id) {
    const block = D.blocks[id], layout = D.layouts[block.t], inner = new Map();
    block.kids.forEach((kid, at) => { if (kid !== null && kid < 0 && open.has(-1 - kid)) inner.set(at, compose(-1 - kid)); });
    const wide = [], high = [];
    for (const [at, child] of inner) {
      const [x, y, w, h] = layout.nodes[at];
      wide.push([x - w / 2, x + w / 2, child.width]);
      high.push([y - h / 2, y + h / 2, child.height]);
    }
    const X = stretched(wide), Y = stretched(high);
    const width = LABELS + X(layout.size[0]) + PAD, top = id ? HEAD + GAP : 0, height = Y(layout.size[1]) + top + GAP;
    return { id, block, layout, inner, X: x => LABELS + X(x), Y: y => top + Y(y), width, height };
  }

  // Where a point of a line goes: at its ends it stays on the outline of the box.
  function attached(part, node, [x, y]) {
    const found = part.layout.nodes[node];
    if (!found) return [part.X(x), part.Y(y)];
    const [cx, cy, w, h] = found, child = part.inner.get(node);
    if (!child) return [part.X(cx) + x - cx, part.Y(cy) + y - cy];
    if (Math.abs(y - cy) > h / 2 - 2) return [part.X(x), part.Y(cy) + Math.sign(y - cy) * child.height / 2 + y - cy - Math.sign(y - cy) * h / 2];
    return [part.X(cx) + Math.sign(x - cx) * child.width / 2, part.Y(y)];
  }

  // --- drawing ------------------------------------------------------------------------------------------------------

  function draw(part, x, y, out) {
    const { id, block, layout } = part;
    out.push(`<g transform="translate(${n(x)} ${n(y)})">`);
    if (id) {
      out.push(`<rect width="${n(part.width)}" height="${n(part.height)}" rx="9" fill="#ffffff" stroke="#8f9bab" stroke-width="1.3"/>`,
        `<g class="head" data-block="${id}"><rect width="${n(part.width)}" height="${HEAD}" rx="9" fill="#eceff4"/>`,
        `<text x="12" y="17.5" font-size="12" font-weight="600" fill="#262f3c">− ${escaped(short(block.title, 60))}</text></g>`);
    }
    block.bands.forEach((span, at) => drawBand(part, span, at, out));
    if (!id && layout.bands.length) out.push('<text x="12" y="19" font-size="12" font-weight="600" fill="#8390a1">inputs</text>');
    const routes = layout.lines.map(line => routed(part, line));
    [0, STRONG].forEach(strong => layout.lines.forEach((line, at) => {
      if ((line[3] & STRONG) === strong) drawLine(part, line, routes[at], at, out);
    }));
    layout.lines.forEach((line, at) => drawRings(part, line, routes[at], out));
    layout.nodes.forEach((node, at) => { if (!part.inner.has(at)) drawNode(part, node, at, out); });
    for (const [at, child] of part.inner) {
      const [cx, cy] = layout.nodes[at];
      draw(child, part.X(cx) - child.width / 2, part.Y(cy) - child.height / 2, out);
    }
    out.push('</g>');
  }

  function drawBand(part, span, at, out) {
    const [top, bottom] = part.layout.bands[at].map(part.Y), names = D.stages[span[0]].names;
    const left = part.id ? 1 : 0, width = part.width - 2 * left;
    out.push(`<g class="stage" data-first="${span[0]}" data-last="${span[1]}">`,
      `<rect x="${left}" y="${n(top)}" width="${n(width)}" height="${n(bottom - top)}" fill="${BANDS[at % 2]}"/>`,
      `<path d="M${left} ${n(top)}h${n(width)}" stroke="#d5dbe3" stroke-dasharray="2 3"/>`,
      `<text x="12" y="${n(top + 18)}" font-size="12" font-weight="600" fill="#3a4556">${title(span)}</text>`);
    const room = Math.max(1, Math.floor((bottom - top - 26) / 13));
    const cut = names.length ? names.map(line => within(D.lines[line], part.block.path)) : ['empty cut'];
    const shown = cut.length > room ? room === 1 && cut.length > 1 ? [`${cut.length} live values`] : [...cut.slice(0, room - 1), `+${cut.length - room + 1} live`] : cut;
    shown.forEach((name, row) => out.push(`<text x="12" y="${n(top + 32 + 13 * row)}" font-size="10" fill="#7b8798">${escaped(short(name, 21))}</text>`));
    out.push('</g>');
  }

  // A line's points in this state of the page, [[x, y], …]: start, three a Bézier segment, tip.
  function routed(part, [source, target, , , flat]) {
    const points = [];
    for (let i = 0; i < flat.length; i += 2) points.push([flat[i], flat[i + 1]]);
    return points.map((point, at) => at === 0 ? attached(part, source, point)
      : at >= points.length - 2 ? attached(part, target, point) : [part.X(point[0]), part.Y(point[1])]);
  }

  function drawLine(part, [source, target, colour, flags, , crosses, ops], points, at, out) {
    const end = points[points.length - 1], before = points[points.length - 2];
    const length = Math.hypot(end[0] - before[0], end[1] - before[1]) || 1, strong = flags & STRONG;
    const back = Math.min(8, length), dx = (before[0] - end[0]) / length, dy = (before[1] - end[1]) / length;
    const base = flags & ARROW ? [end[0] + dx * back, end[1] + dy * back] : end;
    const path = `M${points[0].map(n)}C${points.slice(1, -1).map(p => p.map(n)).join(' ')}L${base.map(n)}`;
    const half = strong ? 3.6 : 2.9;
    const head = flags & ARROW ? `<polygon points="${n(base[0] - dy * half)},${n(base[1] + dx * half)} ${end.map(n)} ${n(base[0] + dy * half)},${n(base[1] - dx * half)}" fill="${colour}"/>` : '';
    if (strong) out.push(`<path d="${path}" fill="none" stroke="#ffffff" stroke-width="5.2" opacity="0.85"/>`);
    out.push(`<g class="edge" fill="none" data-of="${part.id}" data-line="${at}" data-ops="${ops.map(op => `${part.id}:${op}`).join(' ')}">`,
      `<path d="${path}" stroke="#000000" stroke-opacity="0" stroke-width="9"/>`,
      `<path d="${path}" stroke="${colour}" stroke-width="${strong ? 2.2 : 1.4}" stroke-linejoin="round"${flags & DASHED ? ' stroke-dasharray="5 4"' : ''}/>${head}</g>`);
  }

  // A ring wherever a line crosses a cut that holds its value: together the augmented state.
  function drawRings(part, [, target, colour, , , crosses], points, out) {
    const rings = crosses.filter(at => part.layout.bands[at]).map(at => crossing(points, part.Y(part.layout.bands[at][0])));
    const joint = part.layout.joints[target - part.layout.nodes.length];
    if (joint) rings.push([part.X(joint[0]), part.Y(joint[1])]);
    rings.filter(Boolean).forEach(([x, y]) => out.push(
      `<circle cx="${n(x)}" cy="${n(y)}" r="2.9" fill="#ffffff" stroke="${colour}" stroke-width="1.5"/>`));
  }

  function crossing(points, y) {
    for (let i = 0; i + 3 < points.length; i += 3) {
      const [p, q, r, s] = points.slice(i, i + 4);
      if (Math.min(p[1], s[1]) > y || y > Math.max(p[1], s[1])) continue;
      let low = 0, high = 1, at = p;
      for (let round = 0; round < 24; round++) {
        const t = (low + high) / 2, u = 1 - t;
        at = [0, 1].map(k => u ** 3 * p[k] + 3 * t * u * u * q[k] + 3 * t * t * u * r[k] + t ** 3 * s[k]);
        if ((at[1] < y) === (p[1] < s[1])) low = t; else high = t;
      }
      return at;
    }
    return null;
  }

  function drawNode(part, [cx, cy, w, h, radius, form, colour, accent, together, first, second], at, out) {
    const kid = part.block.kids[at], own = part.block.words[at], [fill, , ink, detail] = D.colours[colour];
    const x = part.X(cx), y = part.Y(cy), left = x - w / 2, top = y - h / 2, dark = form === 'end';
    const words = (s, dy, size, paint, bold) => `<text x="${n(x)}" y="${n(y + dy)}" font-size="${size}" fill="${paint}" text-anchor="middle"${bold ? ' font-weight="600"' : ''}>${escaped(s)}</text>`;
    const what = form === 'block' ? `class="block" data-block="${-1 - kid}"` : kid === null ? 'class="end"' : `class="op" data-op="${kid}"`;
    out.push(`<g ${what} data-node="${part.id}:${at}">`);
    if (form === 'block') out.push(`<rect x="${n(left + 4)}" y="${n(top + 4)}" width="${w}" height="${h}" rx="${radius}" fill="${fill}" stroke="${accent}"/>`);
    out.push(`<rect x="${n(left)}" y="${n(top)}" width="${w}" height="${h}" rx="${radius}" fill="${dark ? '#3a4556' : fill}" stroke="${dark ? '#3a4556' : accent}" stroke-width="${form === 'sign' || form === 'merge' ? 1.8 : 1.2}"/>`);
    if (together) out.push(`<rect x="${n(left + 3)}" y="${n(top + 3)}" width="${n(w - 6)}" height="${n(h - 6)}" rx="${radius - 3}" fill="none" stroke="${D.ring}" stroke-width="1.2"/>`);
    if (form === 'block') out.push(words(`+ ${first}`, -2.5, 12, ink, true), words(own[0], 11, 10, detail));
    else if (form === 'player') out.push(words(first, -2.5, 12, ink, true), words(second, 11, 10, detail));
    else if (form === 'sign') out.push(words(first, 5.8, 17, accent, true));
    else out.push(words(own ? own[0] : first, 3.9, 11, dark ? '#ffffff' : ink));
    out.push('</g>');
  }

  // --- what is said -------------------------------------------------------------------------------------------------

  function stageSays(first, last, headed = true) {
    const stage = D.stages[first], lines = headed ? [title([first, last])] : [];
    if (first === last && stage.says.length) lines.push(text(stage.says));
    lines.push(first === last ? 'in the cut before it:' : 'in the cut before the first of them:');
    lines.push(stage.cut.length ? stage.cut.map(line => '  ' + D.lines[line]).join('\n') : '  nothing');
    return lines.join('\n');
  }

  function said_of(group) {
    const d = group.dataset;
    if (group.matches('g.op')) return { what: text(D.ops[d.op][1]), stage: D.ops[d.op][2] };
    if (group.matches('g.stage')) return { what: '', stage: +d.first, last: +d.last };
    if (group.matches('g.edge')) return { what: lineSays(D.blocks[d.of], D.layouts[D.blocks[d.of].t].lines[d.line]), stage: -1 };
    const [block, at] = (d.node || '').split(':');
    if (group.matches('g.head')) return { what: `${D.blocks[d.block].title}\nclick to close`, stage: -1 };
    const own = block && D.blocks[block].words[at];
    if (group.matches('g.block')) return { what: `${text(own[1])}\nclick to open`, stage: -1 };
    return { what: own ? text(own[1]) : +block ? 'what leaves the block' : 'what the model returns', stage: -1 };
  }

  function lineSays(block, [, , colour, flags, , crosses, ops]) {
    const called = at => {
      const kid = block.kids[at];
      if (kid === undefined) return null;
      if (kid === null) return block.words[at] ? block.words[at][0] : 'output';
      return kid < 0 ? D.blocks[-1 - kid].title : D.ops[kid][0];
    };
    const [source, ...targets] = ops.map(called).filter(Boolean);
    const lines = [targets.length ? `${source} → ${targets.join(', ')}` : `${source} → output`];
    if (D.kinds[colour]) lines.push(D.kinds[colour]);
    if (crosses.length) lines.push(`in the cut before stage ${crosses.map(at => block.bands[at] ? block.bands[at][0] : 'after the last').join(', ')}`);
    return lines.join('\n');
  }

  function tell({ what, stage, last }) {
    const parts = [];
    const add = (name, string, kind) => {
      if (!string) return;
      if (name) { const head = document.createElement('h2'); head.textContent = name; parts.push(head); }
      const block = document.createElement('pre'); block.textContent = string; if (kind) block.className = kind; parts.push(block);
    };
    add('', what);
    if (stage >= 0) {
      add(what ? 'Its stage' : '', stageSays(stage, last === undefined ? stage : last));
      add(`Derivation of stage ${stage}`, text(D.stages[stage].note), 'note');
    }
    said.replaceChildren(...parts);
  }

  function point(event, about) {
    const lines = [about.what];
    if (about.stage >= 0) lines.push(stageSays(about.stage, about.last === undefined ? about.stage : about.last, !about.what));
    words.textContent = lines.filter(Boolean).join('\n');
    tip.style.display = 'block';
    const box = tip.getBoundingClientRect(), frame = pane.getBoundingClientRect();
    const right = event.clientX + 14 + box.width <= frame.right;  // else to the left, not over the side panel
    tip.style.left = Math.max(4, right ? event.clientX + 14 : event.clientX - 14 - box.width) + 'px';
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - box.height - 8)) + 'px';
  }

  // --- view: pan, zoom, open, close ---------------------------------------------------------------------------------

  const places = new Map();
  let x = 0, y = 0, scale = 1, from = null, moved = false, pinned = null, hovered = null, size = [1, 1];
  const move = () => world.setAttribute('transform', `translate(${n(x)} ${n(y)}) scale(${scale})`);

  function render() {
    const out = [], whole = compose(0);
    size = [whole.width, whole.height];
    places.clear();
    draw(whole, 0, 0, out);
    world.innerHTML = out.join('');
    place(whole, 0, 0);
    move();
  }

  // Blocks' places on the whole drawing, for what is to stay where it was on the screen.
  function place(part, left, top) {
    places.set(part.id, [left, top, part.width, part.height]);
    part.layout.nodes.forEach(([cx, cy, w, h], at) => {
      const kid = part.block.kids[at];
      if (kid === null) return;
      const child = part.inner.get(at);
      const [width, height] = child ? [child.width, child.height] : [w, h];
      const to = [left + part.X(cx) - width / 2, top + part.Y(cy) - height / 2];
      if (child) place(child, ...to); else places.set(kid < 0 ? -1 - kid : `op${kid}`, [...to, w, h]);
    });
  }

  const middle = id => { const at = places.get(id); return at && [at[0] + at[2] / 2, at[1]]; };

  function change(id, act) {
    const before = middle(id);
    act();
    render();
    hovered = null;
    svg.classList.remove('hover');
    const after = middle(id);
    if (before && after) { x += (before[0] - after[0]) * scale; y += (before[1] - after[1]) * scale; move(); }
    tip.style.display = 'none';
  }

  function fit(whole) {
    const by = whole ? pane.clientHeight / (size[1] + 20) : 9;
    scale = Math.max(0.02, Math.min(1.2, pane.clientWidth / (size[0] + 20), Math.max(by, whole ? 0 : 0.4)));
    x = Math.max(10, (pane.clientWidth - size[0] * scale) / 2); y = 10; move();
  }

  function zoom(factor, cx, cy) {
    const next = Math.min(6, Math.max(0.02, scale * factor));
    x = cx - (cx - x) * next / scale; y = cy - (cy - y) * next / scale; scale = next; move();
  }

  function openLevel() {
    const next = [...open].flatMap(id => D.blocks[id].kids.filter(kid => kid !== null && kid < 0).map(kid => -1 - kid))
      .filter(id => !open.has(id));
    let count = [...open].reduce((sum, id) => sum + D.blocks[id].kids.length, 0);
    for (const id of next) {
      count += D.blocks[id].kids.length;
      if (count > MOST_OPEN) break;
      open.add(id);
    }
    change(0, () => {});
  }

  function reveal(op) {
    for (let id = D.ops[op][3]; id !== undefined; id = parent.get(id)) open.add(id);
    open.add(0);
    render();
    const at = places.get(`op${op}`);
    scale = Math.max(scale, 0.8);
    x = pane.clientWidth / 2 - (at[0] + at[2] / 2) * scale; y = pane.clientHeight / 2 - (at[1] + at[3] / 2) * scale;
    move();
    pin(world.querySelector(`g.op[data-op="${op}"]`));
  }

  function pin(group) {
    world.querySelectorAll('.picked').forEach(other => other.classList.remove('picked'));
    group.classList.add('picked');
    pinned = said_of(group);
    tell(pinned);
  }

  // --- events -------------------------------------------------------------------------------------------------------

  const center = factor => zoom(factor, pane.clientWidth / 2, pane.clientHeight / 2);
  const on = (id, act) => { document.getElementById(id).onclick = act; };
  on('in', () => center(1.25));
  on('out', () => center(0.8));
  on('all', () => fit(true));
  on('open', openLevel);
  on('close', () => { open.clear(); open.add(0); render(); fit(false); });
  pane.addEventListener('wheel', event => {
    const box = pane.getBoundingClientRect();
    event.preventDefault();
    if (event.ctrlKey || event.metaKey) zoom(Math.exp(-event.deltaY / 300), event.clientX - box.left, event.clientY - box.top);
    else { x -= event.deltaX; y -= event.deltaY; move(); }
    tip.style.display = 'none';
  }, { passive: false });
  pane.addEventListener('pointerdown', event => {
    from = [event.clientX - x, event.clientY - y]; moved = false;
  });
  window.addEventListener('pointermove', event => {
    if (!from) return;
    const to = [event.clientX - from[0], event.clientY - from[1]];
    if (!moved && Math.abs(to[0] - x) + Math.abs(to[1] - y) <= 3) return;
    moved = true; [x, y] = to; pane.classList.add('drag'); tip.style.display = 'none'; move();
  });
  window.addEventListener('pointerup', () => { from = null; pane.classList.remove('drag'); });
  const KINDS = 'g.op, g.block, g.end, g.edge, g.head, g.stage';
  svg.addEventListener('pointermove', event => {
    if (from && moved) return;
    const group = event.target.closest(KINDS);
    if (group !== hovered) {
      hovered = group;
      const node = group && group.dataset.node;
      svg.classList.toggle('hover', Boolean(node));
      if (node) world.querySelectorAll('g.edge').forEach(edge => edge.classList.toggle('lit', edge.dataset.ops.split(' ').includes(node)));
      if (group && !group.matches('g.edge, g.head, g.end')) tell(said_of(group));
      else if (pinned) tell(pinned);
    }
    if (group) point(event, said_of(group)); else tip.style.display = 'none';
  });
  svg.addEventListener('pointerleave', () => {
    hovered = null; tip.style.display = 'none'; svg.classList.remove('hover');
    if (pinned) tell(pinned);
  });
  svg.addEventListener('click', event => {
    if (moved) return;
    const group = event.target.closest(KINDS);
    if (!group) return;
    const id = +group.dataset.block;
    if (group.matches('g.block')) change(id, () => open.add(id));
    else if (group.matches('g.head')) change(id, () => open.delete(id));
    else if (group.matches('g.op, g.stage')) pin(group);
  });
  let last = -1;
  find.addEventListener('keydown', event => {
    if (event.key !== 'Enter') { last = event.key.length > 1 ? last : -1; return; }
    const wanted = find.value.trim().toLowerCase();
    const found = wanted ? D.ops.findIndex(([name], at) => at > last && name.toLowerCase().includes(wanted)) : -1;
    find.classList.toggle('none', Boolean(wanted) && found < 0 && last < 0);
    last = found;
    if (found >= 0) reveal(found);
  });
  render();
  fit(false);
})();
