"use strict";
for (const stage of document.querySelectorAll(".stage")) scatter(stage);

function scatter(stage) {
  const data = JSON.parse(document.getElementById(stage.dataset.points).textContent);
  const sprite = document.getElementById(stage.dataset.sprite);
  const canvas = stage.querySelector(".scatter");
  const tip = stage.querySelector(".tip");
  const buttons = stage.parentElement.querySelectorAll(".legend button");
  const thumb = tip.querySelector("canvas");
  const margin = 22;
  let width = 0, height = 0, chosen = -1, shown = null;

  const px = i => margin + data.x[i] * (width - 2 * margin);
  const py = i => height - margin - data.y[i] * (height - 2 * margin);
  const visible = i => shown === null || (shown === "member" ? data.member[i] === 1 : data.cluster[i] === shown);

  function resize() {
    const ratio = window.devicePixelRatio || 1;
    width = canvas.clientWidth;
    height = canvas.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.getContext("2d").setTransform(ratio, 0, 0, ratio, 0, 0);
    draw();
  }

  function draw() {
    const context = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink");
    const colour = label => style.getPropertyValue(label < 0 ? "--noise" : "--c" + (label % 8));
    const colours = new Map([...new Set(data.cluster)].map(label => [label, colour(label)]));
    context.clearRect(0, 0, width, height);
    const order = data.x.map((_, i) => i).sort((a, b) => data.member[a] - data.member[b]);
    for (const i of order) {
      context.globalAlpha = visible(i) ? 0.85 : 0.1;
      context.fillStyle = colours.get(data.cluster[i]);
      dot(context, px(i), py(i), 3.6);
      context.fill();
      if (data.member[i]) {
        context.strokeStyle = ink;
        context.lineWidth = 1.3;
        dot(context, px(i), py(i), 5.6);
        context.stroke();
      }
    }
    context.globalAlpha = 1;
    if (chosen >= 0) {
      context.strokeStyle = ink;
      context.lineWidth = 2;
      dot(context, px(chosen), py(chosen), 9);
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

  function describe(i) {
    const w = data.width, h = data.height;
    thumb.width = w;
    thumb.height = h;
    thumb.style.imageRendering = w <= 64 ? "pixelated" : "auto";
    thumb.getContext("2d").drawImage(sprite, i % data.columns * w, Math.floor(i / data.columns) * h, w, h, 0, 0, w, h);
    tip.querySelector("bdi").textContent = data.name[i];
    const group = data.cluster[i] < 0 ? "in no cluster" : "cluster " + data.cluster[i];
    tip.querySelector("span").textContent =
      "sample " + data.index[i] + ", " + group + (data.member[i] ? ", carries the artifact" : "");
    const left = px(i) + 14 + tip.offsetWidth > width ? px(i) - 14 - tip.offsetWidth : px(i) + 14;
    const top = Math.min(Math.max(py(i) - tip.offsetHeight / 2, 4), height - tip.offsetHeight - 4);
    tip.style.left = Math.max(left, 4) + "px";
    tip.style.top = top + "px";
  }

  function nearest(x, y, reach) {
    let best = -1, least = reach * reach;
    for (let i = 0; i < data.x.length; i++) {
      if (!visible(i)) continue;
      const distance = (px(i) - x) ** 2 + (py(i) - y) ** 2;
      if (distance < least) { least = distance; best = i; }
    }
    return best;
  }

  // The closest point in the arrow's direction, sideways distance counting double.
  function towards(dx, dy) {
    if (chosen < 0) return nearest(width / 2, height / 2, Infinity);
    let best = chosen, least = Infinity;
    for (let i = 0; i < data.x.length; i++) {
      if (!visible(i)) continue;
      const x = px(i) - px(chosen), y = py(i) - py(chosen);
      const along = x * dx + y * dy, across = Math.abs(x * dy - y * dx);
      if (along > 0.5 && along + 2 * across < least) { least = along + 2 * across; best = i; }
    }
    return best;
  }

  const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  canvas.addEventListener("keydown", event => {
    if (event.key in arrows) choose(towards(...arrows[event.key]));
    else if (event.key === "Escape") choose(-1);
    else return;
    event.preventDefault();
  });
  const point = event => choose(nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 28 : 14));
  canvas.addEventListener("pointermove", point);
  canvas.addEventListener("pointerdown", point);
  canvas.addEventListener("pointerleave", event => { if (event.pointerType === "mouse") choose(-1); });
  canvas.addEventListener("blur", () => choose(-1));
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const value = button.dataset.cluster === "member" ? "member" : Number(button.dataset.cluster);
      shown = shown === value ? null : value;
      for (const other of buttons) other.setAttribute("aria-pressed", String(other === button && shown !== null));
      choose(-1);
      draw();
    });
  }
  resize();
  new ResizeObserver(resize).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
