// The trace as the panel reads it: decodes the payload of ming_app/router/payload.py, only what is new since last time.
// Text of tokens is data throughout: it reaches the page by textContent alone.

class Trace {
  constructor() { this.reset({ key: "", state: "empty", layers: 0, experts: 0, k: 0 }); }

  reset(head) {
    this.head = head;
    this.tokens = [];            // {id, text, answer, piece, logprob}
    this.pieces = [];            // {text, tokens: [index...], answer}
    this.seen = { tokens: "", e: "", w: "" };
    this.bytes = { e: new Uint8Array(1 << 14), w: new Uint8Array(1 << 14) };
    this.length = { e: 0, w: 0 };
    this.size = 0;               // tokens that have routing
    this.split = 0;              // tokens of the question
    this.mixed = false;
  }

  // Takes a payload; true when it is another answer than before (everything is drawn anew).
  take(payload) {
    const grown = payload.key === this.head.key && ["tokens", "e", "w"].every((n) => payload[n].startsWith(this.seen[n]));
    if (!grown) this.reset(payload);
    this.head = payload;
    this.append("e", payload.e.slice(this.seen.e.length));
    this.append("w", payload.w.slice(this.seen.w.length));
    for (const line of payload.tokens.slice(this.seen.tokens.length).split("\n")) if (line) this.addToken(JSON.parse(line));
    this.seen = { tokens: payload.tokens, e: payload.e, w: payload.w };
    this.contributions = bytesOf(payload.c);
    this.entropies = bytesOf(payload.h);
    this.size = Math.min(this.tokens.length, Math.floor(this.length.e / Math.max(this.row, 1)));
    return !grown;
  }

  get row() { return this.head.layers * 3 * this.head.k; }

  append(name, base64) {
    if (!base64) return;
    const text = atob(base64);
    let held = this.bytes[name];
    while (held.length < this.length[name] + text.length) {
      const larger = new Uint8Array(held.length * 2);
      larger.set(held);
      held = this.bytes[name] = larger;
    }
    for (let i = 0; i < text.length; i++) held[this.length[name] + i] = text.charCodeAt(i);
    this.length[name] += text.length;
  }

  addToken([id, text, answer, piece, logprob, others = []]) {
    const index = this.tokens.push({ id, text, answer: !!answer, piece, logprob, others }) - 1;
    if (!answer) {
      this.mixed ||= index > 0 && this.tokens[index - 1].answer; // several texts, one after another
      this.split = index + 1;
    }
    const last = this.pieces[this.pieces.length - 1];
    if (last && last.piece === piece && last.answer === !!answer) {
      last.text += text;
      last.tokens.push(index);
    } else {
      this.pieces.push({ piece, text, tokens: [index], answer: !!answer });
    }
    this.tokens[index].at = this.pieces.length - 1;
  }

  // k pairs [expert, weight 0..1] of a token at a layer and projection, larger router logit first.
  chosen(token, layer, projection) {
    const { k } = this.head, from = token * this.row + (layer * 3 + projection) * k;
    return Array.from({ length: k }, (_, j) => [this.bytes.e[from + j], this.bytes.w[from + j] / 255]);
  }

  // k contributions (|what the expert adds| / |the base's output|) beside `chosen`; null where they were not measured.
  added(token, layer, projection) {
    const { k } = this.head, from = token * this.row + (layer * 3 + projection) * k;
    return this.contributions.length ? Array.from({ length: k }, (_, j) => 4 * (this.contributions[from + j] / 255) ** 2) : null;
  }

  // Entropy of the router, 0..1 of log E; null where it was not measured.
  entropy(token, layer, projection) {
    return this.entropies.length ? this.entropies[token * this.head.layers * 3 + layer * 3 + projection] / 255 : null;
  }

  top(token, layer, projection) { return this.bytes.e[token * this.row + (layer * 3 + projection) * this.head.k]; }

  // For up and down of every layer: which of gate's experts each of theirs is oftenest chosen with, over all tokens. Numbers
  // of different matrices have nothing in common; this is what makes them comparable.
  partners() {
    if (this.paired?.size === this.size) return this.paired.of;
    const { layers, experts } = this.head, of = [];
    for (let layer = 0; layer < layers; layer++) {
      of.push([1, 2].map((projection) => {
        const together = Array.from({ length: experts }, () => new Uint32Array(experts));
        for (let t = 0; t < this.size; t++) together[this.top(t, layer, projection)][this.top(t, layer, 0)]++;
        return together.map((row) => row.indexOf(Math.max(...row)));
      }));
    }
    this.paired = { size: this.size, of };
    return of;
  }

  // 0, 1 or 2: how many of up and down put a token where gate does.
  agreement(token, layer) {
    const own = this.top(token, layer, 0);
    return this.partners()[layer].reduce((sum, partner, i) => sum + (partner[this.top(token, layer, i + 1)] === own), 0);
  }

  // Weight of the top expert stretched from [1/k, 1] to [0, 1], for shading.
  strength(token, layer, projection) {
    const { k } = this.head, w = this.bytes.w[token * this.row + (layer * 3 + projection) * k] / 255;
    return k > 1 ? Math.max(0, Math.min(1, (w - 1 / k) / (1 - 1 / k))) : 1;
  }

  // [E] shares of the choices among tokens [from, size); one layer and projection, or all of them when layer is null.
  load(from, layer, projection) {
    const { experts, k } = this.head, counts = new Array(experts).fill(0);
    const begin = layer === null ? 0 : (layer * 3 + projection) * k, end = layer === null ? this.row : begin + k;
    for (let t = from; t < this.size; t++)
      for (let i = t * this.row + begin, to = t * this.row + end; i < to; i++) counts[this.bytes.e[i]]++;
    const all = counts.reduce((a, b) => a + b, 0) || 1;
    return counts.map((n) => n / all);
  }
}

function bytesOf(base64) {
  return Uint8Array.from(atob(base64 || ""), (character) => character.charCodeAt(0));
}
