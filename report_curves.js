// The learning curves of report.py's page, in one script with report.js, whose h, s, $ and number it uses.
"use strict";
// Every panel shares one cursor, and its legend reads the values there.
const DASHES = ["", "6 3", "2 3", "8 3 2 3"];
const BOX = {width: 340, height: 172, left: 42, right: 8, top: 8, bottom: 20};  // SVG units; the page scales it

function smooth(values, window) {  // centred mean as in report.py; running sums keep a long run quick
  const half = window >> 1, sums = [0], counts = [0];
  values.forEach((value, i) => { sums.push(sums[i] + (value ?? 0)); counts.push(counts[i] + (value != null)); });
  return values.map((value, i) => {
    const from = Math.max(0, i - half), to = Math.min(values.length, i + half + 1);
    return value == null ? null : (sums[to] - sums[from]) / (counts[to] - counts[from]);
  });
}

function ticks(low, high) {  // round numbers, three to five of them
  const rough = (high - low) / 4, unit = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 2.5, 5, 10].map(k => k * unit).find(k => k >= rough), first = Math.ceil(low / gap - 1e-9);
  return Array.from({length: Math.floor(high / gap + 1e-9) - first + 1}, (_, i) => (first + i) * gap);
}

function curveScale(steps, series, limits) {
  const known = series.flat().filter(value => value != null);
  const [low, high] = limits || [known.reduce((a, b) => Math.min(a, b)), known.reduce((a, b) => Math.max(a, b))];
  const pad = ((high - low) || Math.abs(high) || 1) * 0.06, from = low - pad, to = high + pad;
  const first = steps[0], span = steps[steps.length - 1] - first || 1, inner = BOX.width - BOX.left - BOX.right;
  return {
    from, to, first, last: steps[steps.length - 1],
    x: i => BOX.left + inner * (steps[i] - first) / span,
    y: value => BOX.height - BOX.bottom - (BOX.height - BOX.top - BOX.bottom) * (value - from) / (to - from),
    nearest(x) {  // index of the step under an SVG x
      const at = first + span * (x - BOX.left) / inner;
      return steps.reduce((best, step, i) => Math.abs(step - at) < Math.abs(steps[best] - at) ? i : best, 0);
    },
  };
}

function makePanel(spec, table, onPoint) {  // -> {element, draw(window), mark(index of the step)}
  const series = spec.columns.map(name => table[name]), scale = curveScale(table.step, series, spec.limits);
  const lines = s("g"), marks = s("g"), reads = spec.columns.map(() => h("b"));
  const style = k => `stroke: var(--c${k % 7})`;
  const path = values => {
    let pen = "M";  // lifted over gaps
    return values.map((value, i) => {
      const point = value == null ? "" : `${pen}${scale.x(i).toFixed(1)} ${scale.y(value).toFixed(1)}`;
      pen = value == null ? "M" : "L";
      return point;
    }).join("");
  };
  const floor = BOX.height - 4, right = BOX.width - BOX.right;
  const svg = s("svg",
    {viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", "aria-label": `${spec.title} over steps`},
    ticks(scale.from, scale.to).map(value => [
      s("line", {class: "grid", x1: BOX.left, x2: right, y1: scale.y(value), y2: scale.y(value)}),
      s("text", {x: BOX.left - 6, y: scale.y(value) + 4, "text-anchor": "end"}, number(value))]),
    s("text", {x: BOX.left, y: floor}, number(scale.first)),
    s("text", {x: right, y: floor, "text-anchor": "end"}, `step ${number(scale.last)}`), lines, marks);
  const follow = event => {
    const area = svg.getBoundingClientRect();
    onPoint(scale.nearest((event.clientX - area.left) / area.width * BOX.width));
  };
  svg.addEventListener("pointermove", follow);
  svg.addEventListener("pointerdown", follow);
  const key = k => s("svg", {viewBox: "0 0 22 8"},
    s("line", {x1: 0, x2: 22, y1: 4, y2: 4, "stroke-width": 2.5, style: style(k), "stroke-dasharray": DASHES[k % 4]}));
  const legend = spec.columns.map((name, k) => h("span", {}, key(k), name.split("/").pop() + " ", reads[k]));
  return {
    element: h("div", {class: "card panel"}, h("h3", {}, spec.title), h("div", {class: "meaning"}, spec.meaning),
      h("div", {class: "legend"}, legend), svg),
    draw(window) {
      const raw = window > 1 && series.length < 3 ? series : [];  // behind more curves it would be a tangle
      lines.replaceChildren(
        ...raw.map((values, k) => s("path", {class: "curve raw", style: style(k), d: path(values)})),
        ...series.map((values, k) => s("path",
          {class: "curve", style: style(k), "stroke-dasharray": DASHES[k % 4], d: path(smooth(values, window))})));
    },
    mark(i) {
      const x = scale.x(i), known = series.map((values, k) => [values[i], k]).filter(([value]) => value != null);
      marks.replaceChildren(s("line", {class: "cross", x1: x, x2: x, y1: BOX.top, y2: BOX.height - BOX.bottom}),
        ...known.map(([value, k]) => s("circle", {cx: x, cy: scale.y(value), r: 3, style: `fill: var(--c${k % 7})`})));
      series.forEach((values, k) => { reads[k].textContent = number(values[i]); });
    },
  };
}

function showCurves(page) {
  const steps = page.table.step;
  if (!steps.length) {  // an evaluation
    $("curves").closest("section").hidden = $("to-curves").hidden = true;
    return;
  }
  const moveTo = i => {
    $("cursor").value = i;
    $("cursor-value").value = number(steps[i]);
    panels.forEach(panel => panel.mark(i));
  };
  const redraw = () => {
    const window = Number($("window").value);
    $("window-value").value = window > 1 ? `${window} steps` : "off";
    panels.forEach(panel => panel.draw(window));
  };
  const panels = page.panels.map(spec => {
    const panel = makePanel(spec, page.table, moveTo);
    ($(spec.group) || $("machine")).append(panel.element);
    return panel;
  });
  $("machine").parentNode.hidden = !$("machine").children.length;
  $("window").value = Math.min(51, 2 * Math.floor(steps.length / 20) + 1);
  $("window").addEventListener("input", redraw);
  $("cursor").max = steps.length - 1;
  $("cursor").addEventListener("input", () => moveTo(Number($("cursor").value)));
  redraw();
  moveTo(steps.length - 1);
}
