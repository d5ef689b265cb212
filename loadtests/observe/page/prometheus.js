// Prometheus's answers as Grafana's frames.
import { FieldType } from '@grafana/data';

const POINTS = 400;

/** What the page's address says: which dashboard, of which Prometheus, about when and about which model. */
export function asked() {
  const told = new URLSearchParams(window.location.search);
  const to = Number(told.get('to')) || Date.now() / 1000;
  const from = Number(told.get('from')) || to - 3600;
  return {
    board: told.get('board') || 'overview',
    prometheus: told.get('prometheus') || 'http://127.0.0.1:9090',
    from,
    to,
    isLive: !told.get('to'),
    step: Math.max(1, Math.ceil((to - from) / POINTS)),
    model: told.get('model'),
    interval: told.get('interval') || '1m',
  };
}

/** Put values in the place of Grafana's variables. */
export function whole(expr, view) {
  const values = { model: view.model || '.+', __rate_interval: view.interval, __range: `${Math.ceil(view.to - view.from)}s` };
  return expr.replace(/\$(\w+)/g, (_, name) => values[name]);
}

export function named(legend, labels) {
  return legend.replace(/\{\{(\w+)\}\}/g, (_, label) => labels[label] || label);
}

async function get(view, path, parameters) {
  const answer = await fetch(`${view.prometheus}/api/v1/${path}?${new URLSearchParams(parameters)}`);
  const told = await answer.json();
  if (told.status !== 'success') {
    throw new Error(told.error);
  }
  return told.data;
}

export async function models(view) {
  const told = await get(view, 'query', { query: 'count by (model) (roundhouse_model_phase)', time: view.to });
  return told.result.map((one) => one.metric.model).sort();
}

/** A frame of time and value for each series of a target. */
export async function lines(target, view) {
  const parameters = { query: whole(target.expr, view), start: view.from, end: view.to, step: view.step };
  const told = await get(view, 'query_range', parameters);
  return told.result.map((series) => ({
    refId: target.refId,
    length: series.values.length,
    fields: [
      { name: 'Time', type: FieldType.time, config: { interval: view.step * 1000 }, values: series.values.map(([at]) => at * 1000) },
      {
        name: 'Value',
        type: FieldType.number,
        config: { displayNameFromDS: named(target.legendFormat, series.metric) },
        labels: series.metric,
        values: series.values.map(([, value]) => (value === 'NaN' ? null : Number(value))),
      },
    ],
  }));
}

/** One frame with a row for each series of a target, as it is at the end. */
export async function table(target, view, isOnly) {
  const { result } = await get(view, 'query', { query: whole(target.expr, view), time: view.to });
  const labels = [...new Set(result.flatMap((one) => Object.keys(one.metric)))];
  return {
    refId: target.refId,
    length: result.length,
    fields: [
      { name: 'Time', type: FieldType.time, config: {}, values: result.map((one) => one.value[0] * 1000) },
      ...labels.map((label) => ({ name: label, type: FieldType.string, config: {}, values: result.map((one) => one.metric[label]) })),
      {
        name: isOnly ? 'Value' : `Value #${target.refId}`,
        type: FieldType.number,
        config: {},
        values: result.map((one) => Number(one.value[1])),
      },
    ],
  };
}

/** Single traced requests: milliseconds since the epoch, value, trace. */
export async function exemplars(target, view) {
  const told = await get(view, 'query_exemplars', { query: whole(target.expr, view), start: view.from, end: view.to });
  return told.flatMap((series) => series.exemplars).map((one) => [one.timestamp * 1000, Number(one.value), one.labels.trace_id]);
}

/** The stretches of time in which a dashboard's marks have a value. */
export async function marks(annotations, view) {
  const all = annotations.map(async (one) => {
    const step = parseInt(one.step, 10);
    const told = await get(view, 'query_range', { query: whole(one.expr, view), start: view.from, end: view.to, step });
    return told.result.flatMap((series) => stretches(series.values, step).map(([from, to]) => ({
      from: from * 1000, to: to * 1000, color: one.iconColor, text: named(one.titleFormat, series.metric),
    })));
  });
  return (await Promise.all(all)).flat();
}

function stretches(values, step) {
  const found = [];
  for (const [at] of values) {
    const last = found[found.length - 1];
    if (last && at - last[1] <= step) {
      last[1] = at;
    } else {
      found.push([at, at]);
    }
  }
  return found;
}
