// The layers x tokens map on a canvas that covers only what is visible: the scroll box holds an empty space of full
// width, the canvas sticks to its left edge and is drawn again after each scroll, update or change of theme.

class HeatMap {
  static HEAD = 46;              // px above the cells, for the tokens' text
  static SIDE = 26;              // px left of the cells, for the layers' numbers
  static WIDTHS = [2, 4, 6, 9, 13, 18, 24, 32];

  constructor(box, trace, view, onPick) {
    Object.assign(this, { box, trace, view, onPick, step: 5, fitted: false, follow: true });
    this.canvas = box.querySelector("canvas");
    this.space = box.querySelector(".xp-space");
    box.addEventListener("scroll", () => {
      this.follow = box.scrollLeft + box.clientWidth >= box.scrollWidth - 8;
      this.schedule();
    });
    new ResizeObserver(() => this.layout()).observe(box);
    this.visible = false;
    new IntersectionObserver((seen) => {
      this.visible = seen.at(-1).isIntersecting;
      this.schedule();
    }).observe(box);
    this.canvas.addEventListener("click", (event) => {
      const cell = this.cellAt(event);
      if (cell) onPick(cell.token, cell.layer);
    });
  }

  get first() { return this.view.prompt ? 0 : this.trace.split; }
  get columns() { return Math.max(0, this.trace.size - this.first); }
  get cw() {
    if (!this.fitted) return HeatMap.WIDTHS[this.step];
    return Math.max(1, Math.min(32, (this.box.clientWidth - HeatMap.SIDE - 2) / Math.max(1, this.columns)));
  }
  get ch() { return this.trace.head.layers > 32 ? 11 : 14; }

  zoom(by) {
    this.step = Math.max(0, Math.min(HeatMap.WIDTHS.length - 1, this.step + by));
    this.fitted = false;
    const middle = (this.box.scrollLeft + this.box.clientWidth / 2) / Math.max(1, this.box.scrollWidth);
    this.layout();
    this.box.scrollLeft = middle * this.box.scrollWidth - this.box.clientWidth / 2;
  }

  fit() { this.fitted = true; this.layout(); }

  // Sizes the space and the canvas after new tokens, a zoom or a new width of the panel; keeps the end in view.
  layout() {
    const end = this.follow;
    this.space.style.width = `${HeatMap.SIDE + this.columns * this.cw}px`;
    this.space.style.height = `${HeatMap.HEAD + this.trace.head.layers * this.ch + 1}px`;
    if (end && this.trace.head.state === "live") this.box.scrollLeft = this.box.scrollWidth;
    this.schedule();
  }

  // Draws in the next frame; what is out of sight waits until it comes into view.
  schedule() {
    if (this.waiting || !this.visible) return;
    this.waiting = true;
    requestAnimationFrame(() => { this.waiting = false; this.draw(); });
  }

  // Colours of every expert at 17 strengths, blended over the surface, each with a readable text colour.
  palette() {
    const style = getComputedStyle(this.box), read = (name) => style.getPropertyValue(name).trim();
    if (this.painted === read("--m-surface")) return; // the same appearance as last time
    this.painted = read("--m-surface");
    const surface = rgb(this.painted);
    this.ink = read("--m-ink");
    this.faint = read("--m-muted");
    this.mark = read("--m-focus");
    this.colours = Array.from({ length: 8 }, (_, e) => {
      const full = rgb(read(`--x${e}`));
      return Array.from({ length: 17 }, (_, s) => {
        const mix = 0.25 + 0.75 * (s / 16), c = full.map((v, i) => Math.round(v * mix + surface[i] * (1 - mix)));
        const text = contrast(c, [16, 24, 28]) > contrast(c, [255, 255, 255]) ? "#10181c" : "#ffffff";
        return [`rgb(${c})`, text];
      });
    });
  }

  draw() {
    const { box, canvas, trace, view, cw, ch } = this, { layers } = trace.head;
    if (!layers || !box.clientWidth) return;
    this.palette();
    const wide = Math.min(box.clientWidth, this.space.offsetWidth), high = HeatMap.HEAD + layers * ch + 1;
    const ratio = window.devicePixelRatio || 1;
    canvas.width = wide * ratio;
    canvas.height = high * ratio;
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    const g = canvas.getContext("2d");
    g.scale(ratio, ratio);
    const shift = box.scrollLeft, from = Math.max(0, Math.floor(shift / cw));
    const to = Math.min(this.columns, Math.ceil((shift + wide - HeatMap.SIDE) / cw));
    const x = (column) => HeatMap.SIDE + column * cw - shift;
    g.save();
    g.beginPath();
    g.rect(HeatMap.SIDE, 0, wide - HeatMap.SIDE, high);
    g.clip();
    this.drawCells(g, from, to, x);
    if (cw >= 12) this.drawTexts(g, from, to, x);
    this.drawMarks(g, x, high);
    g.restore();
    this.drawLayers(g);
  }

  drawCells(g, from, to, x) {
    const { trace, view, cw, ch } = this, gap = cw >= 6 ? 1 : 0, numbers = cw >= 12;
    g.font = "600 10px system-ui, sans-serif";
    g.textAlign = "center";
    g.textBaseline = "middle";
    for (let c = from; c < to; c++) {
      const token = this.first + c, left = x(c);
      for (let layer = 0; layer < trace.head.layers; layer++) {
        const expert = view.agree ? trace.agreement(token, layer) : trace.top(token, layer, view.projection);
        const strength = view.agree ? expert / 2 : trace.strength(token, layer, view.projection);
        const [fill, text] = this.colours[view.agree ? 2 : expert % 8][Math.round(strength * 16)];
        const y = HeatMap.HEAD + layer * ch;
        g.fillStyle = fill;
        g.fillRect(left, y, Math.max(1, cw - gap), ch - 1);
        if (!numbers) continue;
        g.fillStyle = text;
        g.fillText(expert, left + (cw - gap) / 2, y + ch / 2);
      }
    }
  }

  drawTexts(g, from, to, x) {
    g.fillStyle = this.ink;
    g.font = "12px system-ui, 'Noto Sans CJK SC', 'PingFang SC', 'Microsoft YaHei', sans-serif";
    g.textBaseline = "middle";
    for (let c = from; c < to; c++) {
      const text = shown(this.trace.tokens[this.first + c].text).trim();
      g.save();
      g.translate(x(c) + this.cw / 2, HeatMap.HEAD - 5);
      if ([...text].length > 1) {
        g.rotate(-Math.PI / 2);
        g.textAlign = "left";
        g.fillText([...text].slice(0, 6).join(""), 0, 0);
      } else {
        g.textAlign = "center";
        g.fillText(text, 0, -5);
      }
      g.restore();
    }
  }

  drawMarks(g, x, high) {
    const { trace, view, cw, ch } = this;
    if (view.prompt && trace.split > 0) {
      g.fillStyle = this.ink;
      g.fillRect(x(trace.split - this.first) - 1, HeatMap.HEAD - 4, 2, high);
    }
    g.strokeStyle = this.mark;
    g.lineWidth = 2;
    const column = view.token === null ? -1 : view.token - this.first;
    if (column >= 0) g.strokeRect(x(column) - 1, HeatMap.HEAD - 1, Math.max(cw, 3) + 1, trace.head.layers * ch + 1);
    const from = HeatMap.SIDE - 2, to = Math.min(this.canvas.clientWidth + 4, x(this.columns) + 1);
    g.strokeRect(from, HeatMap.HEAD + view.layer * ch - 1, Math.max(0, to - from), ch + 1);
  }

  drawLayers(g) {
    g.font = "10px system-ui, sans-serif";
    g.textAlign = "right";
    g.textBaseline = "middle";
    for (let layer = 0; layer < this.trace.head.layers; layer++) {
      const chosen = layer === this.view.layer;
      if (!chosen && layer % 3) continue;
      if (!chosen && Math.abs(layer - this.view.layer) === 1) continue;
      g.fillStyle = chosen ? this.ink : this.faint;
      g.fillText(layer, HeatMap.SIDE - 6, HeatMap.HEAD + layer * this.ch + this.ch / 2);
    }
  }

  // Token and layer under a mouse event, or null.
  cellAt(event) {
    const area = this.canvas.getBoundingClientRect(), px = event.clientX - area.left, py = event.clientY - area.top;
    const column = Math.floor((px - HeatMap.SIDE + this.box.scrollLeft) / this.cw), layer = Math.floor((py - HeatMap.HEAD) / this.ch);
    if (px < HeatMap.SIDE || column < 0 || column >= this.columns || layer >= this.trace.head.layers) return null;
    return { token: this.first + column, layer: Math.max(0, layer) };
  }

  // Scrolls so that a token's column is visible.
  show(token) {
    const left = (token - this.first) * this.cw, room = this.box.clientWidth - HeatMap.SIDE;
    if (left < this.box.scrollLeft) this.box.scrollLeft = left - this.cw;
    else if (left + this.cw > this.box.scrollLeft + room) this.box.scrollLeft = left + 2 * this.cw - room;
  }
}

function rgb(colour) {
  const hex = colour.replace("#", "");
  return [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16));
}

function luminance(c) {
  const [r, g, b] = c.map((v) => (v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  const [low, high] = [luminance(a), luminance(b)].sort((p, q) => p - q);
  return (high + 0.05) / (low + 0.05);
}

// Token text with its invisible characters made visible; spaces only where there is nothing else.
function shown(text) {
  const seen = text.trim() ? text : text.replace(/ /g, "␣");
  return seen.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/[\u0000-\u001f\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]/g, "·");
}
