// Runs once for each scrubber (gr.HTML's js_on_load): `element`, `props`, `watch` and `trigger` come from Gradio.
// All frames are in props.value; nothing here asks the server for anything, except on a click on an action.

const find = (selector) => element.querySelector(selector);
const stage = find('.stage'), tokenStage = find('.of-token'), slider = find('.slider'), playButton = find('.play');
const reads = Object.fromEntries([...element.querySelectorAll('[data-read]')].map((node) => [node.dataset.read, node]));
const PLAY_SECONDS = 4; // from the first to the last token, at speed 1
const ICONS = { play: 'M4 2.5v11l9-5.5z', pause: 'M3.5 2.5h3v11h-3zm6 0h3v11h-3z' };

let value = null; // the latest value
let bitmaps = []; // one decoded strip for each prefix length, none until it is ready
let received = 0; // strips of the value that are decoded, or being
let tiles = []; // {canvas, node, ofToken} in the strip's order
let k = 0; // prefix length shown; 0: nothing yet
let following = true; // stay at the newest frame
let target = 0; // where to rest when all frames are there; 0: at the last
let place = 0; // where the visitor has gone, for the page's address; 0: nowhere
let chosen = 0; // index of the chosen picture
let hovered = null; // token under the pointer
let player = null; // animation frame of the player

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// ---------------------------------------------------------------------------------------------- frames

async function decode(url, index, id) {
  const bytes = Uint8Array.from(atob(url.slice(url.indexOf(',') + 1)), (c) => c.charCodeAt(0));
  const type = url.slice(5, url.indexOf(';'));
  const bitmap = await createImageBitmap(new Blob([bytes], { type }));
  if (!value || value.id !== id) return; // a newer run has begun
  bitmaps[index] = bitmap;
  if (following || index + 1 === k) show(following ? newest() : k);
  else paintTrack();
  rest();
  if (value.play && newest() === value.cutoffs.length && !matchMedia('(prefers-reduced-motion: reduce)').matches) play();
}

function rest() {
  if (target && following && !value.busy && newest() === value.cutoffs.length) {
    following = false;
    show(target);
    target = 0;
  }
}

function newest() {
  // Frames may be decoded out of order: only an unbroken run from the first counts.
  let n = 0;
  while (bitmaps[n]) n++;
  return n;
}

function receive(arrived = true) {
  const next = props.value;
  if (!next) return empty();
  const fresh = !value || value.id !== next.id;
  const before = value;
  value = next;
  if (fresh) begin(before, arrived);
  for (; received < next.frames.length; received++) decode(next.frames[received], received, next.id);
  find('.status').textContent = next.status;
  if (!next.busy && (fresh || (before && before.busy))) find('[role=status]').textContent = next.status;
  drawChips();
  drawCharts();
  refresh();
  rest();
}

// As before the first picture.
function empty() {
  stop();
  [value, bitmaps, received, tiles, marks, drawn, k, chosen, hovered] = [null, [], 0, [], [], '', 0, 0, null];
  following = true;
  stage.replaceChildren(...(props.hint ? [make('p', 'no-frames', props.hint)] : []));
  for (const name of ['.of-token', '.chips', '.charts']) find(name).replaceChildren();
  for (const name of ['.status', '[role=status]', '.which']) find(name).textContent = '';
  find('.tokens').hidden = true;
  slider.max = slider.value = 1;
  refresh();
}

function begin(before, arrived) {
  const keep = value.keep_place && before && !before.busy && k > 0; // a run that was not shown whole has no place
  stop();
  received = 0;
  if (!keep) k = 0;
  // Of the same shape, the old frames stay until the new ones take their places.
  const pictures = (v) => v.groups.flatMap((group) => group.captions).length;
  if (!keep || pictures(before) !== pictures(value)) bitmaps = [];
  following = !keep || k >= value.cutoffs.length;
  const linked = linkedPlace();
  target = linked || value.rest;
  if (!keep) notePlace(linked, true);
  const count = value.groups[0].captions.length;
  if (!keep || chosen >= count) chosen = 0;
  const shape = (v) => v && JSON.stringify([v.groups, v.selectable]);
  if (shape(before) !== shape(value)) buildTiles();
  slider.max = value.cutoffs.length;
  find('.chips').replaceChildren();
  // On a phone the pictures may be out of sight of what asked for them.
  const area = stage.getBoundingClientRect();
  if (arrived && !keep && (area.top > window.innerHeight - 160 || area.bottom < 160)) {
    element.scrollIntoView({ block: 'start', behavior: 'smooth' });
  }
}

// ---------------------------------------------------------------------------------------------- pictures

function buildTiles() {
  tiles = [];
  stage.replaceChildren();
  tokenStage.replaceChildren();
  find('.which').textContent = '';
  value.groups.forEach((group, g) => {
    const row = make('div', 'row');
    row.setAttribute('role', 'group');
    if (group.title) row.setAttribute('aria-label', group.title);
    group.captions.forEach((caption, i) => {
      const choice = value.selectable && g === 0;
      const node = make(choice ? 'button' : 'figure', 'tile');
      const canvas = make('canvas');
      canvas.setAttribute('role', 'img');
      node.append(canvas);
      if (choice) {
        node.type = 'button';
        node.addEventListener('click', () => { if (!dragged) choose(i); });
      } else if (caption) node.append(make('figcaption', '', caption));
      row.append(node);
      tiles.push({ canvas, node, ofToken: !!group.of_token, caption: caption || group.title || '', group: g });
    });
    (group.of_token ? tokenStage : stage).append(row);
  });
  fit();
}

// The largest tiles that fit the width and a part of the window's height, in whole screen pixels for each pixel.
function fit() {
  if (!tiles.length) return;
  const gap = 8, width = element.clientWidth, scale = window.devicePixelRatio || 1, narrow = width < 520;
  const rows = value.groups.filter((group) => !group.of_token);
  // On a phone the pictures may fill the screen, less the controls: these stick to its lower edge.
  const height = narrow ? window.innerHeight - 150 : Math.max(260, Math.min(520, window.innerHeight * 0.55));
  const count = Math.max(...rows.map((group) => group.captions.length));
  const byWidth = (n) => (width - gap * (n - 1)) / n;
  const byHeight = (lines) => (height - gap * (lines - 1)) / lines - (value.selectable ? 0 : 18);
  let side = 0, columns = 1;
  if (rows.length > 1) {
    // Comparisons: pictures of a row side by side, or in halves on a narrow screen.
    columns = byWidth(count) >= 110 ? count : Math.ceil(count / 2);
    side = columns === count ? Math.min(byWidth(count), Math.max(140, byHeight(rows.length))) : byWidth(columns);
  } else {
    // A sheet: seen whole, all lines full and as wide as the page if that does not cost too much.
    let best = 0;
    for (let n = 1; n <= count; n++) {
      const fits = Math.min(byWidth(n), byHeight(Math.ceil(count / n)));
      const worth = fits * (count % n ? 0.7 : 1) * Math.sqrt(fits / byWidth(n));
      if (worth > best) [best, side, columns] = [worth, fits, n];
    }
  }
  const whole = (Math.floor((side * scale) / value.image_size) * value.image_size) / scale;
  side = whole > side * 0.75 ? whole : Math.floor(side);
  element.style.setProperty('--rendering', side * scale < value.image_size ? 'auto' : 'pixelated');
  stage.style.setProperty('--tile', side + 'px');
  stage.style.setProperty('--columns', columns);
  tokenStage.style.setProperty('--tile', Math.min(side, 128, Math.floor(byWidth(4))) + 'px');
}

function paint() {
  const at = bitmaps[k - 1], which = bitmaps[(hovered || k) - 1] ? hovered || k : k;
  const token = bitmaps[which - 1];
  if (tiles.some((tile) => tile.ofToken) && value.codes[which - 1]) {
    const gain = value.gains[which - 1];
    find('.which').textContent = 'Token ' + which + ', code ' + value.codes[which - 1][0] + ', changes the picture by this much' + (gain ? ', shown ' + gain + ' times:' : ':');
  }
  tiles.forEach((tile, i) => {
    const strip = tile.ofToken ? token : at;
    if (!strip) return;
    const side = strip.height, context = tile.canvas.getContext('2d');
    if (tile.canvas.width !== side) tile.canvas.width = tile.canvas.height = side;
    context.imageSmoothingEnabled = false;
    context.clearRect(0, 0, side, side);
    context.drawImage(strip, i * side, 0, side, side, 0, 0, side, side);
    const what = tile.caption || 'image ' + (i + 1);
    tile.canvas.setAttribute('aria-label', what + ', ' + (tile.ofToken ? 'token ' + which : 'first ' + k + ' tokens'));
  });
}

function choose(index) {
  chosen = index;
  find('.chips').replaceChildren();
  drawChips();
  refresh();
}

// ---------------------------------------------------------------------------------------------- place

function show(next) {
  const last = newest();
  k = Math.max(0, Math.min(next, last));
  paint();
  refresh();
}

function moveTo(next) {
  const last = newest();
  next = Math.max(1, Math.min(next, last));
  following = next >= last;
  show(next);
  notePlace(following ? 0 : k);
}

// The place stands in the page's address, as `k`, for the tab that is open: it is read once, for the first pictures. It is
// written at once with new pictures, so that a link copied then is right; while the slider moves, now and then.
const tab = element.closest('[id^="tab-"]')?.id.slice('tab-'.length);
const openTab = () => new URLSearchParams(location.search).get('tab') || 'generate';
window.spectralarPlace ??= Number(new URLSearchParams(location.search).get('k')) || 0;
let noting = null;

function linkedPlace() {
  const linked = tab === openTab() ? window.spectralarPlace : 0;
  if (linked) window.spectralarPlace = 0;
  return linked;
}

function notePlace(next, atOnce = false) {
  place = next;
  clearTimeout(noting);
  if (atOnce) writePlace();
  else noting = setTimeout(writePlace, 400);
}

function writePlace() {
  if (!window.spectralarOpened || tab !== openTab()) return;
  const query = new URLSearchParams(location.search);
  if (place) query.set('k', place); else query.delete('k');
  history.replaceState(history.state, '', location.pathname + '?' + query + location.hash);
}

function figure(node, big, small) {
  node.replaceChildren(document.createTextNode(big + ' '), make('small', '', small));
}

function refresh() {
  const N = value ? value.cutoffs.length : 0;
  const ready = k > 0;
  slider.disabled = playButton.disabled = !ready;
  if (!ready) for (const node of Object.values(reads)) node.textContent = '–';
  else {
    const r = value.cutoffs[k - 1], before = k > 1 ? value.cutoffs[k - 2] : 0, H = value.image_size;
    slider.value = k;
    figure(reads.k, k, 'of ' + N);
    figure(reads.cutoff, r, 'of ' + H);
    if (r > before) figure(reads.band, before === r - 1 ? before : before + '–' + (r - 1), '');
    else figure(reads.band, '', 'none, refines');
    figure(reads.bits, Math.round(value.bits[k - 1]), 'of ' + Math.round(value.bits[N - 1]));
    slider.setAttribute('aria-valuetext', k + ' of ' + N + ' tokens, cutoff ' + r + ' of ' + H + ', ' + Math.round(value.bits[k - 1]) + ' bits');
  }
  paintTrack();
  tiles.forEach((tile, i) => {
    if (tile.node.tagName !== 'BUTTON') return;
    tile.node.setAttribute('aria-pressed', String(i === chosen && tiles.filter((t) => t.group === 0).length > 1));
  });
  for (const button of find('.actions').children) {
    button.textContent = button.dataset.label.replace('{image}', chosen + 1).replace('{k}', ready ? placeOf(button.dataset) : '…');
    button.disabled = !ready || value.busy;
  }
  [...find('.chips').children].forEach((chip, i) => {
    chip.classList.toggle('ahead', i + 1 > k);
    chip.setAttribute('aria-current', String(i + 1 === k));
  });
  markCharts();
}

function paintTrack() {
  const N = value ? value.cutoffs.length : 2, part = (n) => (N > 1 ? (100 * Math.max(0, n - 1)) / (N - 1) : 100) + '%';
  slider.style.setProperty('--at', part(k));
  slider.style.setProperty('--loaded', part(newest()));
}

function play() {
  if (player !== null) return stop();
  if (k >= newest()) show(1);
  following = false;
  let from = k, start = null;
  playButton.querySelector('path').setAttribute('d', ICONS.pause);
  playButton.setAttribute('aria-label', 'Pause');
  let speed = null;
  const step = (now) => {
    const wanted = Number(find('select').value);
    if (speed !== wanted) { speed = wanted; from = k; start = now; } // go on from here at the new speed
    const next = from + Math.floor(((now - start) / 1000) * speed * (value.cutoffs.length / PLAY_SECONDS));
    if (next !== k) show(Math.max(next, k));
    if (k >= newest()) { following = true; return stop(); }
    player = requestAnimationFrame(step);
  };
  player = requestAnimationFrame(step);
}

function stop() {
  if (player !== null) {
    cancelAnimationFrame(player);
    notePlace(following ? 0 : k);
  }
  player = null;
  playButton.querySelector('path').setAttribute('d', ICONS.play);
  playButton.setAttribute('aria-label', 'Play');
}

// ---------------------------------------------------------------------------------------------- tokens

function drawChips() {
  find('.tokens').hidden = !value.codes.length;
  const chips = find('.chips');
  for (let i = chips.children.length; i < value.codes.length; i++) {
    const r = value.cutoffs[i], before = i ? value.cutoffs[i - 1] : 0;
    const band = r > before ? (before === r - 1 ? String(before) : before + '–' + (r - 1)) : '=';
    const chip = make('button', 'chip');
    chip.type = 'button';
    const code = value.codes[i][Math.min(chosen, value.codes[i].length - 1)];
    chip.append(make('span', '', String(i + 1)), make('b', '', String(code)), make('small', '', band));
    chip.setAttribute('aria-label', 'Token ' + (i + 1) + ', code ' + code + (r > before ? ', opens band ' + band : ', opens no band'));
    chip.title = chip.getAttribute('aria-label');
    chip.addEventListener('click', () => { stop(); moveTo(i + 1); trigger('token', { k: i + 1, image: chosen }); });
    for (const [event, token] of [['pointerenter', i + 1], ['focus', i + 1], ['pointerleave', null], ['blur', null]]) {
      chip.addEventListener(event, () => { hovered = token; paint(); });
    }
    chips.append(chip);
  }
}

// ---------------------------------------------------------------------------------------------- input

let dragged = false, pressedAt = null;
stage.addEventListener('pointerdown', (event) => { pressedAt = { x: event.clientX, k }; dragged = false; });
window.addEventListener('pointermove', (event) => {
  if (!pressedAt || !event.buttons || !k) return;
  const distance = event.clientX - pressedAt.x;
  if (!dragged && Math.abs(distance) < 8) return;
  dragged = true;
  stop();
  moveTo(pressedAt.k + Math.round((distance / Math.max(200, stage.clientWidth * 0.7)) * value.cutoffs.length));
});
window.addEventListener('pointerup', () => { pressedAt = null; });

slider.addEventListener('input', () => { stop(); moveTo(Number(slider.value)); });
playButton.addEventListener('click', play);
element.addEventListener('keydown', (event) => {
  if (event.target.matches('select') || event.ctrlKey || event.metaKey || event.altKey || !k) return;
  const onSlider = event.target === slider;
  const moves = { ArrowLeft: -1, ArrowRight: 1 };
  if (event.key === ' ' && onSlider) play();
  else if (event.key in moves && !onSlider) { stop(); moveTo(k + moves[event.key]); }
  else return;
  event.preventDefault();
});

for (const action of props.actions || []) {
  const button = make('button', '', action.label);
  button.type = 'button';
  Object.assign(button.dataset, action);
  button.addEventListener('click', () => {
    if (action.name === 'save') return save();
    trigger('action', { name: action.name, image: chosen, k: placeOf(action) });
  });
  find('.actions').append(button);
}

// The prefix length an action is for: of what needs some tokens left, half of them where the slider is at the end.
function placeOf(action) {
  return action.partial && k >= value.cutoffs.length ? Math.ceil(k / 2) : k;
}

// The chosen picture as it is shown, in its own pixels.
function save() {
  tiles[chosen].canvas.toBlob((blob) => {
    const link = make('a');
    link.href = URL.createObjectURL(blob);
    link.download = value.name + '-' + (chosen + 1) + '-k' + k + '.png';
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }, 'image/png');
}

new ResizeObserver(fit).observe(element);
watch('value', receive);
receive(false);
