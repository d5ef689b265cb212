// The dashboards without Grafana: their files, drawn by Grafana's components over a Prometheus's answers.
import React, { useEffect, useLayoutEffect, useState } from 'react';
import { createRoot } from 'react-dom/client';
import { createTheme, dateTime, FieldType, getDisplayProcessor, ThemeContext } from '@grafana/data';
import { BigValue, GlobalStyles, PanelChrome, Table, TimeSeries } from '@grafana/ui';
import 'uplot/dist/uPlot.min.css';
import { asked, exemplars, lines, marks, models, table } from './prometheus';

const theme = createTheme({ colors: { mode: 'light' } });
const ROW = 38;
const GAP = 8;

/** Give a frame's values the panel's unit, colours and styles, as the panel's defaults and overrides say. */
function configured(frames, { defaults, overrides = [] }) {
  frames.forEach((frame, index) => {
    for (const field of frame.fields) {
      if (field.type === FieldType.time) {
        field.display = getDisplayProcessor({ field, theme });
        continue;
      }
      const name = field.config.displayName || field.config.displayNameFromDS || field.name;
      const config = { ...defaults, ...field.config, custom: { ...defaults.custom } };
      for (const { matcher, properties } of overrides) {
        if (matcher.id === 'byName' && matcher.options === name) {
          for (const { id, value } of properties) {
            const [first, second] = id.split('.');
            if (second) {
              config[first][second] = value;
            } else {
              config[first] = value;
            }
          }
        }
      }
      field.config = config;
      const numbers = field.values.filter((value) => typeof value === 'number');
      const [min, max] = [Math.min(...numbers), Math.max(...numbers)];
      field.state = { displayName: name, seriesIndex: index, range: { min, max, delta: max - min } };
      field.display = getDisplayProcessor({ field, theme });
    }
  });
  return frames;
}

/** The merge and organize transformations: rows of equal labels become one, columns get their names and order. */
function organized(frames, transformations) {
  const { indexByName, renameByName } = transformations.find((one) => one.id === 'organize').options;
  const names = Object.keys(indexByName).sort((a, b) => indexByName[a] - indexByName[b]);
  const labels = names.filter((name) => !(name in renameByName));
  const rows = new Map();
  for (const frame of frames) {
    for (let index = 0; index < frame.length; index += 1) {
      const row = Object.fromEntries(frame.fields.map((field) => [field.name, field.values[index]]));
      const key = labels.map((label) => row[label]).join('\n');
      rows.set(key, { ...rows.get(key), ...row });
    }
  }
  const sorted = [...rows.values()].filter((row) => labels.every((label) => row[label] !== undefined));
  return {
    length: sorted.length,
    fields: names.map((name) => ({
      name: renameByName[name] || name,
      type: name in renameByName ? FieldType.number : FieldType.string,
      config: {},
      values: sorted.map((row) => row[name] ?? null),
    })),
  };
}

/** Draws stretches of time and single requests upon a plot. */
function Marks({ config, events, dots }) {
  useLayoutEffect(() => {
    config.addHook('draw', (u) => {
      const { ctx, bbox } = u;
      ctx.save();
      ctx.beginPath();
      ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
      ctx.clip();
      for (const event of events) {
        const left = u.valToPos(event.from, 'x', true);
        ctx.fillStyle = ctx.strokeStyle = theme.visualization.getColorByName(event.color);
        ctx.globalAlpha = 0.12;
        ctx.fillRect(left, bbox.top, Math.max(1, u.valToPos(event.to, 'x', true) - left), bbox.height);
        ctx.globalAlpha = 0.8;
        ctx.setLineDash([4, 4]);
        ctx.beginPath();
        ctx.moveTo(left, bbox.top);
        ctx.lineTo(left, bbox.top + bbox.height);
        ctx.stroke();
        if (bbox.width > 1200) {
          ctx.globalAlpha = 1;
          ctx.font = `${11 * devicePixelRatio}px sans-serif`;
          ctx.fillText(event.text, left + 4, bbox.top + 12 * devicePixelRatio);
        }
      }
      ctx.setLineDash([]);
      ctx.globalAlpha = 0.9;
      ctx.fillStyle = theme.visualization.getColorByName('blue');
      for (const [at, value] of dots) {
        const x = u.valToPos(at, 'x', true);
        const y = u.valToPos(value, u.series[1].scale, true);
        ctx.fillRect(x - 3, y - 3, 6, 6);
      }
      ctx.restore();
    });
  }, [config, events, dots]);
  return null;
}

function Lines({ frames, panel, view, events, dots, width, height }) {
  const range = { from: dateTime(view.from * 1000), to: dateTime(view.to * 1000) };
  return (
    <TimeSeries
      frames={frames}
      timeRange={{ ...range, raw: range }}
      timeZone="utc"
      width={width}
      height={height}
      legend={{ calcs: [], ...panel.options.legend }}
    >
      {(config) => <Marks config={config} events={events} dots={dots} />}
    </TimeSeries>
  );
}

function Single({ frames, width, height }) {
  return (
    <div className="stats">
      {frames.map((frame) => {
        const [x, y] = frame.fields;
        const value = y.display(y.values.filter((one) => one !== null).pop());
        return (
          <BigValue
            key={y.state.displayName}
            value={{ ...value, title: frames.length > 1 ? y.state.displayName : undefined }}
            sparkline={{ x, y }}
            colorMode="value"
            graphMode="area"
            justifyMode="auto"
            width={width / frames.length}
            height={height}
            theme={theme}
          />
        );
      })}
    </div>
  );
}

/** What a panel asks in: it may want steps of a minute at least. */
function stepped(panel, view) {
  return panel.interval === '1m' ? { ...view, step: Math.max(60, view.step), interval: '1m' } : view;
}

function usePanel(panel, whole) {
  const [data, setData] = useState();
  useEffect(() => {
    const view = stepped(panel, whole);
    const targets = panel.targets || [];
    const ask = async () => {
      const found = await Promise.all(
        targets.map((one) => (panel.type === 'table' ? table(one, view, targets.length === 1) : lines(one, view)))
      );
      const frames = panel.type === 'table' ? [organized(found, panel.transformations)] : found.flat();
      const traced = await Promise.all(targets.filter((one) => one.exemplar).map((one) => exemplars(one, view)));
      setData({ frames: configured(frames, panel.fieldConfig || { defaults: {} }), dots: traced.flat() });
    };
    ask().catch((error) => setData({ error: String(error) }));
  }, [panel, whole]);
  return data;
}

function Content({ panel, data, ...more }) {
  if (panel.type === 'text') {
    return <div style={{ padding: 8 }}>{panel.options.content}</div>;
  }
  if (!data.frames?.some((frame) => frame.length)) {
    return <div className="empty">{data.error || panel.fieldConfig.defaults.noValue || 'No data'}</div>;
  }
  if (panel.type === 'table') {
    return <Table data={data.frames[0]} width={more.width} height={more.height} />;
  }
  const Kind = panel.type === 'stat' ? Single : Lines;
  return <Kind panel={panel} {...data} {...more} />;
}

function Panel({ panel, view, events, column }) {
  const data = usePanel(panel, view);
  const { x, y, w, h } = panel.gridPos;
  const width = w * column - GAP;
  const height = h * ROW - GAP;
  return (
    <div className="at" style={{ left: x * column, top: y * ROW, width, height }}>
      <PanelChrome title={panel.title} description={panel.description} width={width} height={height} padding="md">
        {(innerWidth, innerHeight) =>
          data && <Content panel={panel} data={data} view={view} events={events} width={innerWidth} height={innerHeight} />
        }
      </PanelChrome>
    </div>
  );
}

function Board({ board, view, events }) {
  const column = (document.body.clientWidth - 24) / 24;
  const bottom = Math.max(...board.panels.map(({ gridPos }) => gridPos.y + gridPos.h));
  return (
    <main style={{ height: bottom * ROW }}>
      {board.panels.map((panel) =>
        panel.type === 'row' ? (
          <div key={`row ${panel.title}`} className="at row" style={{ top: panel.gridPos.y * ROW }}>
            {panel.title}
          </div>
        ) : (
          <Panel key={panel.id} panel={panel} view={view} events={events} column={column} />
        )
      )}
    </main>
  );
}

function address(changes) {
  const told = new URLSearchParams(window.location.search);
  Object.entries(changes).forEach(([name, value]) => told.set(name, value));
  return `?${told}`;
}

function Head({ board, names, view, choices }) {
  const hasModel = board.templating.list.some((one) => one.name === 'model');
  return (
    <header>
      <strong>{board.title}</strong>
      {names.map((name) => (
        <a key={name} href={address({ board: name })}>
          {name}
        </a>
      ))}
      {hasModel && (
        <select value={view.model || ''} onChange={(event) => window.location.assign(address({ model: event.target.value }))}>
          <option value="">All</option>
          {choices.map((name) => (
            <option key={name}>{name}</option>
          ))}
        </select>
      )}
      <span className="note">
        rendered with Grafana&apos;s components, {new Date(view.from * 1000).toISOString().slice(0, 16).replace('T', ' ')} to{' '}
        {new Date(view.to * 1000).toISOString().slice(11, 16)} UTC
      </span>
    </header>
  );
}

/** A single-choice dashboard shows the first model until one is chosen. */
function chosen(board, view, choices) {
  const variable = board.templating.list.find((one) => one.name === 'model');
  return variable && !variable.includeAll && !view.model ? { ...view, model: choices[0] } : view;
}

function Page() {
  const [state, setState] = useState();
  const [error, setError] = useState();
  useEffect(() => {
    const load = async () => {
      const view = asked();
      const names = await (await fetch('dashboards/names.json')).json();
      const board = await (await fetch(`dashboards/${view.board}.json`)).json();
      const choices = await models(view);
      const narrowed = chosen(board, view, choices);
      const events = await marks(board.annotations.list || [], narrowed);
      setState({ board, names, choices, view: narrowed, events });
    };
    const tell = () => load().catch((problem) => setError(String(problem)));
    tell();
    const timer = asked().isLive ? setInterval(tell, 15000) : undefined;
    return () => clearInterval(timer);
  }, []);
  if (!state) {
    return <p style={{ padding: 16 }}>{error || 'Asking Prometheus'}</p>;
  }
  return (
    <>
      <Head {...state} />
      <Board {...state} />
    </>
  );
}

createRoot(document.getElementById('root')).render(
  <ThemeContext.Provider value={theme}>
    <GlobalStyles />
    <Page />
  </ThemeContext.Provider>
);
