// Curves over the prefix length, with the current one marked: a part of scrubber.js, whose names it shares.

let marks = []; // what moves with k: {line, values: [{node, series}], chart, x}
let drawn = ''; // the charts that are drawn

function drawCharts() {
  const charts = value.charts, now = JSON.stringify(charts);
  if (now === drawn) return;
  drawn = now;
  marks = [];
  find('.charts').replaceChildren(...charts.map((chart) => {
    const N = value.cutoffs.length, x = (i) => (N > 1 ? i / (N - 1) : 0.5);
    const all = chart.series.flatMap((series) => series.values).filter((v) => v !== null);
    let low = chart.low ?? Math.min(...all), high = chart.high ?? Math.max(...all);
    if (!(high > low)) { low -= 1; high += 1; }
    const box = make('div', 'chart'), plot = make('div', 'plot'), list = make('ul');
    const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
    svg.setAttribute('viewBox', '0 0 1 1');
    svg.setAttribute('preserveAspectRatio', 'none');
    svg.setAttribute('role', 'img');
    svg.setAttribute('aria-label', chart.title);
    const values = chart.series.map((series, s) => {
      const path = document.createElementNS(svg.namespaceURI, 'path');
      let d = '', pen = 'M';
      series.values.forEach((v, i) => {
        if (v === null) { pen = 'M'; return; }
        d += pen + x(i).toFixed(4) + ' ' + (1 - (v - low) / (high - low)).toFixed(4);
        pen = 'L';
      });
      path.setAttribute('d', d);
      path.setAttribute('class', 's' + s);
      svg.append(path);
      const item = make('li'), node = make('b');
      item.append(make('i', 's' + s), make('span', '', series.name), node);
      list.append(item);
      return { node, series };
    });
    const line = document.createElementNS(svg.namespaceURI, 'line');
    line.setAttribute('y1', 0);
    line.setAttribute('y2', 1);
    svg.append(line);
    const top = make('span', 'limit', high.toFixed(chart.digits)), bottom = make('span', 'limit', low.toFixed(chart.digits));
    top.style.top = '2px';
    bottom.style.bottom = '2px';
    plot.append(svg, top, bottom);
    const seek = (event) => {
      const area = plot.getBoundingClientRect();
      stop();
      moveTo(1 + Math.round(((event.clientX - area.left) / area.width) * (N - 1)));
    };
    plot.addEventListener('pointerdown', seek);
    plot.addEventListener('pointermove', (event) => { if (event.buttons) seek(event); });
    box.append(make('h4', '', chart.title), plot, list);
    marks.push({ line, values, chart, x });
    return box;
  }));
}

function markCharts() {
  for (const { line, values, chart, x } of marks) {
    line.setAttribute('x1', x(k - 1));
    line.setAttribute('x2', x(k - 1));
    for (const { node, series } of values) {
      const v = series.values[k - 1];
      node.textContent = v === undefined ? '' : v === null ? chart.missing : v.toFixed(chart.digits) + (chart.unit ? ' ' + chart.unit : '');
    }
  }
}
