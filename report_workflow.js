// A workflow's text, drawn: stages left to right, a parallel stacked, a conditional as a diamond with its two ways, a
// loop as a bracket with its count. Part of report.py's page, in one script with report.js, whose h and s it uses.
"use strict";
const ROLE = {
  Plan: "plan", Decompose: "plan", Programmer: "solve", Custom: "solve", AnswerGenerate: "solve",
  CustomCodeGenerate: "solve", Test: "check", Review: "check", Verify: "check", Revise: "revise",
  Aggregate: "ensemble", ScEnsemble: "ensemble", MdEnsemble: "ensemble",
};  // Format and plug-ins: "other"

function parseWorkflow(text) {  // the grammar of graph.py: [{kind, nodes: [{id, name}], count}]; null if it is not one
  const tokens = text.match(/->|[\[\](),?:*]|n\d+(?:\.\d+)?(?=\s*:)|[A-Za-z]\w*|\d+|\S/g) || [];
  let at = 0;
  const found = value => tokens[at] === value && ++at;
  const expect = pattern => {
    if (!pattern.test(tokens[at] ?? "")) throw new SyntaxError(`${tokens[at]} in ${text}`);
    return tokens[at++];
  };
  const takeId = () => /^n\d/.test(tokens[at]) && tokens[at + 1] === ":" ? tokens[(at += 2) - 2] : null;
  const node = own => { const id = takeId() || own || null; return {id, name: expect(/^[A-Za-z]/)}; };
  const list = sign => { const nodes = [node()]; while (found(sign)) nodes.push(node()); return nodes; };
  const stage = () => {
    const own = takeId();
    if (found("[")) { const nodes = list(","); expect(/^\]$/); return {kind: "parallel", nodes}; }
    if (!found("(")) return {kind: "operator", nodes: [node(own)]};
    const nodes = list("->");
    if (found("?")) {
      nodes.push(node());
      expect(/^:$/);
      if (/^done$/i.test(tokens[at])) at++; else nodes.push(node());
      expect(/^\)$/);
      return {kind: "conditional", nodes};
    }
    expect(/^\)$/);
    expect(/^\*$/);
    return {kind: "loop", nodes, count: Number(expect(/^\d+$/))};
  };
  try {
    const stages = [];
    while (at < tokens.length) { if (stages.length) expect(/^->$/); stages.push(stage()); }
    return stages;
  } catch (error) {
    if (error instanceof SyntaxError) return null;
    throw error;
  }
}

const HEIGHT = 38, GAP = 24, SLANT = 32;  // of a box; between boxes in a loop; half a diamond's height
const wide = node => Math.max(66, node.name.length * 7.6 + 22);

// What can be drawn, collected as SVG elements. x is a left edge, y a middle; `mark` holds sets of node ids (fresh, ran,
// failed, cached, idle), the id that is `picked`, and `pick`, what to call with the id of a node that is clicked.
function pencil(mark) {
  const drawn = [];
  const line = d => drawn.push(s("path", {class: "flow", d}));
  const text = (x, y, words, kind = "", anchor = "middle") =>
    drawn.push(s("text", {class: kind, x, y, "text-anchor": anchor}, words));
  const arrow = (x1, x2, y) => {
    line(`M${x1} ${y}H${x2 - 5}`);
    drawn.push(s("path", {class: "tip", d: `M${x2} ${y}l-7 -4v8z`}));
  };
  const box = (node, x, y, w = wide(node), diamond = false) => {
    const middle = x + w / 2, half = diamond ? SLANT : HEIGHT / 2;
    const has = name => node.id != null && mark[name] != null && mark[name].has(node.id);
    const badge = has("failed") ? "failed" : has("ran") && (has("fresh") ? "ran" : "re-run");
    const tint = has("cached") || has("idle") ? "var(--kept)" : `var(--${ROLE[node.name] || "other"})`;
    const edge = has("failed") ? "var(--bad)" : tint;
    const style = `fill: color-mix(in srgb, ${tint} 18%, var(--card)); stroke: ${edge}`;
    const states = ["ran", "fresh", "failed", "cached", "idle"].filter(has), press = mark.pick && node.id != null && {
      tabindex: 0, role: "button", "data-key": node.id, "aria-pressed": String(mark.picked === node.id),
      "aria-label": [node.id, node.name, ...states].join(" "), onclick: () => mark.pick(node.id),
      onkeydown: event => { if (" Enter".includes(event.key)) { event.preventDefault(); mark.pick(node.id); } }};
    if (node.id != null && mark.picked === node.id) states.push("picked");
    drawn.push(s("g", {class: ["node", ...states].join(" "), ...press},
      diamond ? s("path", {class: "box", style, d: `M${x} ${y}l${w / 2} ${-half}l${w / 2} ${half}l${-w / 2} ${half}z`})
        : s("rect", {class: "box", style, x, y: y - half, width: w, height: HEIGHT, rx: 7}),
      s("text", {class: "name", x: middle, y: y + (node.id ? 1 : 4), "text-anchor": "middle"}, node.name),
      node.id && s("text", {class: "id", x: middle, y: y + 13, "text-anchor": "middle"}, node.id),
      badge && [s("rect", {class: "badge", x: middle - 19, y: y - half - 9, width: 38, height: 14, rx: 7}),
        s("text", {x: middle, y: y - half + 2, "text-anchor": "middle"}, badge)]));
  };
  return {drawn, line, text, arrow, box};
}

// kind of stage -> its size and how to put it at (x, y): {up, down: extent around y, w, put}
const SHAPES = {
  operator: ({nodes: [node]}, pen) => ({up: 30, down: 20, w: wide(node), put: (x, y) => pen.box(node, x, y)}),
  parallel({nodes}, pen) {
    const w = Math.max(...nodes.map(wide)), half = nodes.length * 26;
    return {up: half + 4, down: half, w: w + 52, put: (x, y) => nodes.forEach((node, i) => {
      const cy = y - half + 26 + 52 * i, far = x + 26 + w;
      pen.line(`M${x} ${y}C${x + 14} ${y} ${x + 10} ${cy} ${x + 26} ${cy}`);
      pen.line(`M${far} ${cy}C${far + 16} ${cy} ${far + 12} ${y} ${far + 26} ${y}`);
      pen.box(node, x + 26, cy, w);
    })};
  },
  conditional({nodes: [check, ...ways]}, pen) {
    const w = wide(check) + 40, branch = Math.max(...ways.map(wide)), left = w + 34, right = left + branch;
    return {up: 74, down: 66, w: right + 22, put(x, y) {
      [[-46, "problem", -6], [46, "fine", 14]].forEach(([dy, label, below], i) => {
        pen.line(`M${x + w / 2} ${y + Math.sign(dy) * SLANT}V${y + dy}H${x + left}`);
        pen.line(`M${x + right} ${y + dy}C${x + right + 16} ${y + dy} ${x + right + 8} ${y} ${x + right + 22} ${y}`);
        pen.text(x + w / 2 + 6, y + dy + below, label, "tag", "start");
        if (ways[i]) return pen.box(ways[i], x + left, y + dy, branch);
        pen.line(`M${x + left} ${y + dy}h${branch}`);
        pen.text(x + left + branch / 2, y + dy + below, "done");
      });
      pen.box(check, x, y, w, true);
    }};
  },
  loop({nodes, count}, pen) {
    const w = nodes.reduce((sum, node) => sum + wide(node) + GAP, 28 - GAP);
    return {up: 48, down: 32, w, put(x, y) {
      pen.drawn.push(s("rect", {class: "loop", x, y: y - 34, width: w, height: 64, rx: 12}));
      pen.text(x + w / 2, y - 39, `↻ up to ${count} ×`, "tag");
      pen.line(`M${x} ${y}h14M${x + w - 14} ${y}h14`);
      nodes.reduce((left, node, i) => {
        if (i) pen.arrow(left - GAP, left, y);
        pen.box(node, left, y);
        return left + wide(node) + GAP;
      }, x + 14);
    }};
  },
};

function drawWorkflow(text, mark = {}, small = false) {
  const stages = parseWorkflow(text), pen = pencil(mark);
  if (!stages) return h("pre", {}, text);
  if (!stages.length) return h("div", {class: "soft"}, "(empty workflow)");
  const blocks = stages.map(stage => SHAPES[stage.kind](stage, pen));
  const [up, down] = ["up", "down"].map(side => Math.max(...blocks.map(block => block[side])));
  const y = up + 2, height = y + down + 2;
  let x = 8;
  pen.drawn.push(s("circle", {class: "tip", cx: 6, cy: y, r: 4}));
  for (const block of blocks) {
    pen.arrow(x, x + 26, y);
    block.put(x + 26, y);
    x += 26 + block.w;
  }
  pen.arrow(x, x + 22, y);
  pen.drawn.push(s("circle", {class: "flow", cx: x + 27, cy: y, r: 4.5}));
  const width = x + 34, [least, most] = small ? [0.36 * width, 0.62 * width] : [0.62 * width, width];
  const style = `width: max(${least}px, min(${most}px, 100%))`;  // shrinks with its card down to `least`, then scrolls
  return h("div", {class: "drawing", tabindex: small ? null : 0},
    s("svg", {viewBox: `0 0 ${width} ${height}`, role: mark.pick ? "group" : "img", "aria-label": text, style}, pen.drawn));
}
