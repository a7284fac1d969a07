// Runs once for each figure (gr.HTML's js_on_load): `element`, `props`, `watch` and `trigger` come from Gradio.

const figure = element.querySelector('figure');
const drawing = figure.querySelector('.drawing');

function show() {
  const value = props.value;
  figure.hidden = !value;
  if (!value) return;
  drawing.innerHTML = value.svg;
  const svg = drawing.querySelector('svg');
  svg.setAttribute('role', 'img');
  svg.setAttribute('aria-label', figure.querySelector('h4').textContent);
}

for (const button of figure.querySelectorAll('button')) {
  button.addEventListener('click', () => trigger('save', { format: button.dataset.format }));
}
watch('value', show);
show();
