
// The embedding of a class. Its points are unpacked when its panel is opened for the first time.
for (const panel of document.querySelectorAll(".panel")) {
  let plot = null;
  const start = () => { if (panel.open && !plot) plot = scatter(panel); };
  panel.addEventListener("toggle", start);
  start();
}

function unpack(text, Kind) {
  return new Kind(Uint8Array.from(atob(text), c => c.charCodeAt(0)).buffer);
}

// What points can be coloured by: groups with a label each, or a scale.
function colourings(data) {
  const found = data.clusterings.map(([name, packed]) => {
    const labels = unpack(packed, Int8Array);
    return { name: "cluster: " + name, column: "cluster", ...grouped(labels, l => l < 0 ? "no cluster" : "cluster " + l, l => l < 0 ? "--noise" : "--c" + l % 8) };
  });
  for (const [name, packed] of data.scores) {
    const values = unpack(packed, Float32Array);
    const known = [...values].filter(Number.isFinite);
    if (known.length) found.push({ name, column: name, values, low: known.reduce((a, b) => Math.min(a, b)), high: known.reduce((a, b) => Math.max(a, b)) });
  }
  if (data.prediction) {
    const labels = unpack(data.prediction, Uint16Array);
    const wrong = [...count(labels)].filter(([l]) => l !== data.own).sort((a, b) => b[1] - a[1]).map(([l]) => l);
    const colour = l => l === data.own ? "--c0" : wrong.indexOf(l) < 6 ? "--c" + (1 + wrong.indexOf(l)) : "--noise";
    const name = l => data.predicted[l] ?? "class " + l;
    found.push({ name: "prediction", column: "prediction", ...grouped(labels, l => "predicted " + name(l), colour), value: i => name(labels[i]) });
  }
  return found;
}

function grouped(labels, title, colour) {
  const groups = [...count(labels)].sort((a, b) => a[0] - b[0]).map(([label, size]) => ({ label, size, title: title(label), colour: colour(label) }));
  return { labels, groups, colourOf: new Map(groups.map(g => [g.label, g.colour])), value: i => labels[i] };
}

function count(labels) {
  const sizes = new Map();
  for (const label of labels) sizes.set(label, (sizes.get(label) || 0) + 1);
  return sizes;
}

// Cividis, which is made to look the same to the colour-blind.
const SCALE = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];
function onScale(t) {
  const at = Math.min(Math.max(t, 0), 1) * (SCALE.length - 1), i = Math.min(Math.floor(at), SCALE.length - 2);
  return "rgb(" + SCALE[i].map((c, k) => Math.round(c + (at - i) * (SCALE[i + 1][k] - c))) + ")";
}

function scatter(panel) {
  const data = JSON.parse(document.getElementById(panel.dataset.points).textContent);
  const xs = unpack(data.x, Uint16Array), ys = unpack(data.y, Uint16Array);
  const index = unpack(data.index, Uint32Array), member = unpack(data.member, Uint8Array);
  const n = xs.length, ways = colourings(data), selected = new Set();
  const nameOf = i => data.names.start + data.names.rest[i];
  const find = query => panel.querySelector(query);
  const canvas = find(".scatter"), stage = find(".stage"), tip = find(".tip"), thumb = find(".tip canvas");
  const legend = find(".legend"), choice = find(".toolbar select"), lassoButton = find("[data-do=lasso]");
  const status = find("[role=status]"), thumbs = find(".thumbs"), said = find("[data-role=said]");
  const sprite = new Image();
  const margin = 22;
  let width = 0, height = 0, chosen = -1, shown = null, way = ways[0], path = null, adding = false;

  sprite.addEventListener("load", () => { if (chosen >= 0) describe(chosen); showThumbs(); });
  Object.assign(sprite, { src: data.sprite });

  const px = i => margin + xs[i] / 65535 * (width - 2 * margin);
  const py = i => height - margin - ys[i] / 65535 * (height - 2 * margin);
  const visible = i => shown === null || (shown === "member" ? member[i] === 1 : way.labels && way.labels[i] === shown);
  const order = [...xs.keys()].sort((a, b) => member[a] - member[b]);

  function resize() {
    const ratio = window.devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    draw();
  }

  function colours() {
    const style = getComputedStyle(document.documentElement);
    const read = name => style.getPropertyValue(name);
    const noise = read("--noise");
    if (!way.labels) {
      const range = way.high - way.low || 1;
      return i => Number.isFinite(way.values[i]) ? onScale((way.values[i] - way.low) / range) : noise;
    }
    const colour = new Map([...way.colourOf].map(([label, name]) => [label, read(name)]));
    return i => colour.get(way.labels[i]);
  }

  function draw() {
    const context = canvas.getContext("2d"), of = colours();
    const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink");
    const radius = n > 3000 ? 2.2 : n > 1000 ? 2.9 : 3.6;
    context.clearRect(0, 0, width, height);
    context.strokeStyle = ink;
    for (const i of order) {
      const faded = !visible(i) || (selected.size && !selected.has(i));
      context.globalAlpha = !visible(i) ? 0.07 : faded ? 0.25 : 0.88;
      context.fillStyle = of(i);
      dot(context, px(i), py(i), selected.has(i) ? radius + 1 : radius);
      context.fill();
      if (member[i]) {
        context.lineWidth = n > 1000 ? 0.9 : 1.2;
        dot(context, px(i), py(i), radius + 1.8);
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    if (path && path.length > 1) {
      context.beginPath();
      path.forEach(([x, y], k) => k ? context.lineTo(x, y) : context.moveTo(x, y));
      context.closePath();
      context.lineWidth = 1.5;
      context.setLineDash([5, 4]);
      context.stroke();
      context.setLineDash([]);
      context.globalAlpha = 0.07;
      context.fillStyle = ink;
      context.fill();
      context.globalAlpha = 1;
    }
    if (chosen >= 0) {
      context.lineWidth = 2;
      dot(context, px(chosen), py(chosen), radius + 5.4);
      context.stroke();
    }
  }

  function dot(context, x, y, radius) {
    context.beginPath();
    context.arc(x, y, radius, 0, 2 * Math.PI);
  }

  function choose(i) {
    if (i === chosen) return;
    chosen = i;
    tip.hidden = i < 0;
    if (i >= 0) describe(i);
    draw();
  }

  const digits = value => Number.isFinite(value) ? String(Number(value.toPrecision(4))) : "not known";
  const inWords = i => (way.labels ? way.groups.find(g => g.label === way.labels[i]).title : way.name + " " + digits(way.values[i]));

  function describe(i) {
    picture(thumb, i);
    tip.querySelector("bdi").textContent = nameOf(i).length > 200 ? nameOf(i).slice(0, 199) + "…" : nameOf(i);
    const text = "sample " + index[i] + ", " + inWords(i) + (member[i] ? ", carries the artifact" : "") + (selected.has(i) ? ", selected" : "");
    tip.querySelector("span").textContent = text;
    said.textContent = document.activeElement === canvas ? nameOf(i).slice(0, 200) + ", " + text : "";
    const left = px(i) + 14 + tip.offsetWidth > width ? px(i) - 14 - tip.offsetWidth : px(i) + 14;
    const top = Math.min(Math.max(py(i) - tip.offsetHeight / 2, 4), height - tip.offsetHeight - 4);
    tip.style.left = Math.max(left, 4) + "px";
    tip.style.top = Math.max(top, 4) + "px";
  }

  function picture(target, i) {
    const w = data.width, h = data.height;
    target.width = w;
    target.height = h;
    target.style.imageRendering = w <= 64 ? "pixelated" : "auto";
    if (sprite.complete && sprite.naturalWidth) target.getContext("2d").drawImage(sprite, i % data.columns * w, Math.floor(i / data.columns) * h, w, h, 0, 0, w, h);
  }

  function nearest(x, y, reach, allowed = visible) {
    let best = -1, least = reach * reach;
    for (let i = 0; i < n; i++) {
      if (!allowed(i)) continue;
      const distance = (px(i) - x) ** 2 + (py(i) - y) ** 2;
      if (distance < least) { least = distance; best = i; }
    }
    return best;
  }

  // The closest point in the arrow's direction, sideways distance counting double.
  function towards(dx, dy) {
    if (chosen < 0) return nearest(width / 2, height / 2, Infinity);
    let best = chosen, least = Infinity;
    for (let i = 0; i < n; i++) {
      if (!visible(i)) continue;
      const x = px(i) - px(chosen), y = py(i) - py(chosen);
      const along = x * dx + y * dy, across = Math.abs(x * dy - y * dx);
      if (along > 0.5 && along + 2 * across < least) { least = along + 2 * across; best = i; }
    }
    return best;
  }

  function select(samples, add) {
    if (!add) selected.clear();
    for (const i of samples) selected.add(i);
    tell();
  }

  function toggle(i) {
    if (!selected.delete(i)) selected.add(i);
    tell();
    describe(i);
  }

  function tell() {
    const total = selected.size, carrying = [...selected].filter(i => member[i]).length;
    status.textContent = total ? total + (total === 1 ? " sample" : " samples") + " of " + n + " selected" + (carrying ? ", " + carrying + " of them with the artifact" : "") : "No sample selected: draw around some, or use the keys.";
    for (const button of panel.querySelectorAll(".selection button:not([data-do=shown])")) button.disabled = !total;
    showThumbs();
    draw();
  }

  function showThumbs() {
    thumbs.replaceChildren();
    const some = [...selected].sort((a, b) => a - b);
    for (const i of some.slice(0, 24)) {
      const small = document.createElement("canvas");
      small.title = nameOf(i).slice(0, 200);
      picture(small, i);
      thumbs.append(small);
    }
    if (some.length > 24) thumbs.append("and " + (some.length - 24) + " more");
  }

  // Ray casting: a point is inside if a ray from it crosses the outline an odd number of times.
  function inside(x, y) {
    let odd = false;
    for (let i = 0, j = path.length - 1; i < path.length; j = i++) {
      const [ax, ay] = path[i], [bx, by] = path[j];
      if (ay > y !== by > y && x < (bx - ax) * (y - ay) / (by - ay) + ax) odd = !odd;
    }
    return odd;
  }

  function rows() {
    return [...selected].sort((a, b) => a - b).map(i => {
      const row = { sample_index: index[i], name: nameOf(i), class: data.class, artifact: member[i] };
      for (const other of ways) {
        const value = other.labels ? other.value(i) : other.values[i];
        row[other.name] = typeof value === "number" && !other.labels ? (Number.isFinite(value) ? Number(value.toPrecision(6)) : null) : value;
      }
      return row;
    });
  }

  function showLegend() {
    legend.replaceChildren();
    shown = null;
    if (!way.labels) {
      const item = document.createElement("li");
      item.className = "ramp";
      const bar = document.createElement("span");
      bar.style.background = "linear-gradient(to right, " + [0, 0.2, 0.4, 0.6, 0.8, 1].map(onScale) + ")";
      item.append(digits(way.low), bar, digits(way.high));
      legend.append(item);
    } else {
      for (const group of way.groups) entry(group.label, group.title + " · " + group.size, group.colour);
    }
    const carrying = member.reduce((a, b) => a + b, 0);
    if (carrying) entry("member", "artifact · " + carrying, null);
  }

  function entry(value, text, colour) {
    const item = document.createElement("li"), button = document.createElement("button"), mark = document.createElement("span");
    button.type = "button";
    button.setAttribute("aria-pressed", "false");
    mark.className = colour ? "swatch" : "ring";
    if (colour) mark.style.background = "var(" + colour + ")";
    button.append(mark, text);
    button.addEventListener("click", () => {
      shown = shown === value ? null : value;
      for (const other of legend.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && shown !== null));
      choose(-1);
      draw();
    });
    item.append(button);
    legend.append(item);
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in arrows) choose(towards(...arrows[event.key]));
    else if (event.key === "Escape" && chosen >= 0) choose(-1);
    else if (event.key === "Escape" && selected.size) select([], false);
    else if ((event.key === "Enter" || event.key === " ") && chosen >= 0) toggle(chosen);
    else if (event.key === "+" && chosen >= 0) {
      for (let k = 0; k < 5; k++) {
        const next = nearest(px(chosen), py(chosen), Infinity, i => visible(i) && !selected.has(i));
        if (next >= 0) selected.add(next);
      }
      tell();
    } else if (event.key === "a" || event.key === "A") select([...xs.keys()].filter(visible), true);
    else return;
    event.preventDefault();
  });

  const drawsOnTouch = () => lassoButton.getAttribute("aria-pressed") === "true";
  canvas.addEventListener("pointerdown", event => {
    if (event.button !== 0) return;
    if (event.pointerType !== "touch" || drawsOnTouch()) {
      path = [[event.offsetX, event.offsetY]];
      adding = event.shiftKey || drawsOnTouch();
      canvas.setPointerCapture(event.pointerId);
    }
    choose(nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 28 : 14));
  });
  canvas.addEventListener("pointermove", event => {
    if (path) {
      const [x, y] = path[path.length - 1];
      if (Math.hypot(event.offsetX - x, event.offsetY - y) < 3) return;
      path.push([event.offsetX, event.offsetY]);
      if (path.length > 2 && chosen >= 0) choose(-1);
      draw();
    } else choose(nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 28 : 14));
  });
  canvas.addEventListener("pointerup", event => {
    if (!path) return;
    const drawn = path.length > 3;
    const hit = drawn ? [...xs.keys()].filter(i => visible(i) && inside(px(i), py(i))) : [];
    path = null;
    if (drawn) select(hit, adding);
    else if (chosen >= 0) toggle(chosen);
    draw();
  });
  canvas.addEventListener("pointercancel", () => { path = null; draw(); });
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse" && !path) choose(-1); });
  canvas.addEventListener("blur", () => choose(-1));

  lassoButton.addEventListener("click", () => {
    lassoButton.setAttribute("aria-pressed", String(!drawsOnTouch()));
    canvas.style.touchAction = drawsOnTouch() ? "none" : "";
  });
  const actions = {
    shown: () => select([...xs.keys()].filter(visible), false),
    clear: () => select([], false),
    csv: () => save("class-" + data.own + "-selection", "csv", rows()),
    json: () => save("class-" + data.own + "-selection", "json", rows()),
  };
  for (const button of panel.querySelectorAll(".selection button")) button.addEventListener("click", actions[button.dataset.do]);
  ways.forEach((other, k) => choice.append(new Option(other.name, k)));
  choice.addEventListener("change", () => { way = ways[choice.value]; choose(-1); showLegend(); draw(); });

  showLegend();
  tell();
  resize();
  new ResizeObserver(resize).observe(canvas);
  for (const query of ["(prefers-color-scheme: dark)", "print"]) matchMedia(query).addEventListener("change", draw);
  return { select };
}
